"""What requests ask for beyond what deepseek-recipe reads: done where the engine can, refused in words where it cannot.

An answer that leaves a wish out in silence passes for one that heeds it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

from dsv4.server.errors import RequestError

Json = dict[str, Any]

_NO_GRAMMAR = "nothing holds an answer to a schema, a grammar or a list here"
# Field -> why it is refused where it has a value. An empty one, false and the neutral value ask for nothing.
_CHAT_WISHES = {
    "logit_bias": "no bias is added to logits here",
    "audio": "answers are text here",
    "functions": "functions are declared in `tools` here",
    "function_call": "a function is chosen with `tool_choice` here",
    "web_search_options": "there is no web search here",
    "min_tokens": "no answer is kept from ending here",
    "ignore_eos": "no answer is kept from ending here",
    "stop_token_ids": "answers end at texts, given in `stop`, here",
    "bad_words": "no words are kept out of answers here",
    "logits_processors": "logits are not changed here",
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar"), _NO_GRAMMAR),
    **dict.fromkeys(("structured_outputs", "regex", "ebnf", "grammar", "json_schema"), _NO_GRAMMAR),
    "use_beam_search": "answers are sampled here",
    "prompt_logprobs": "only tokens of answers have log-probabilities here",
    "echo": "an answer does not repeat its prompt here",
    "include_stop_str_in_output": "an answer ends before its stop string here",
    "truncate_prompt_tokens": "no prompt is cut here",
    "continue_final_message": "an answer is begun with `prefix` in the last message here",
}
_MESSAGES_WISHES = {
    "output_format": _NO_GRAMMAR,
    "mcp_servers": "this server calls no other servers",
    "container": "this server runs no code",
}
_NEUTRAL = {"repetition_penalty": 1, "length_penalty": 1, "typical_p": 1, "best_of": 1}


@dataclass(frozen=True)
class Sampling:
    """Sampling that deepseek-recipe does not read, as SamplingParams has it."""

    top_k: int = 0
    min_p: float = 0.0

    @classmethod
    def of(cls, request: Json) -> Sampling:
        """`top_k` and `min_p` of a request; -1 is also no limit. RequestError 400 names the range."""
        top_k, min_p = request.get("top_k"), request.get("min_p")
        if top_k is None:
            top_k = 0
        if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < -1:
            raise _invalid("top_k", top_k, "integers of 1 or more, and 0 or -1 for no limit")
        if min_p is None:
            min_p = 0.0
        if isinstance(min_p, bool) or not isinstance(min_p, (int, float)) or not 0.0 <= min_p <= 1.0:
            raise _invalid("min_p", min_p, "[0, 1]")
        return cls(max(top_k, 0), float(min_p))


def refuse_chat_wishes(request: Json) -> None:
    """RequestError 400 for what Chat Completions ask for and nobody here does."""
    form = request.get("response_format")
    kind = cast(Json, form).get("type") if isinstance(form, dict) else None
    if kind in ("json_schema", "regex"):
        raise RequestError(
            400,
            f"This response_format type is unavailable now: {kind!r}; text and json_object are available",
            param="response_format",
        )
    modalities = request.get("modalities")
    if isinstance(modalities, list) and any(kind != "text" for kind in cast("list[object]", modalities)):
        raise _invalid("modalities", cast(object, modalities), '["text"]')
    _refuse(request, _CHAT_WISHES)
    for name, neutral in _NEUTRAL.items():
        if request.get(name) not in (None, neutral):
            raise _invalid(name, request[name], f"{neutral}, which changes nothing; it is not implemented")


def refuse_messages_wishes(request: Json) -> None:
    """RequestError 400 for what Messages ask for and nobody here does."""
    config = request.get("output_config")
    if isinstance(config, dict) and cast(Json, config).get("format") is not None:
        raise _unavailable("output_config.format", _NO_GRAMMAR)
    _refuse(request, _MESSAGES_WISHES)


def _refuse(request: Json, wishes: dict[str, str]) -> None:
    for name, reason in wishes.items():
        if request.get(name):
            raise _unavailable(name, reason)


def _unavailable(name: str, reason: str) -> RequestError:
    return RequestError(400, f"{name} is unavailable: {reason}. Send the request without it", param=name)


def _invalid(name: str, value: object, allowed: str) -> RequestError:
    shown = value if not isinstance(value, float) or math.isfinite(value) else str(value)
    return RequestError(400, f"Invalid {name} value {shown!r}; allowed: {allowed}", param=name)
