"""Fields of a request that belong to another API than the one that it was sent to, or to another server.

A field that is unknown everywhere has no effect, as in the hosted service. One that another API or server knows, and
that would change the answer, is read where the same can be done here, and refused with the place of the wish where it
cannot: this module says so for every format. Own fields count before those of others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from dsv4.engine.sampling_params import MAX_SEED
from dsv4.server.unchecked_json import Json
from dsv4.server.wishes import invalid, refuse_sampling, refuse_wishes, unavailable

_MAX_TOKENS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_FREE_CHOICES = ("none", "auto")  # of tools, where there are none

_GRAMMARS = (
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs"),
    *("regex", "ebnf", "grammar", "json_schema"),
)
_OF_SERVERS = {  # vLLM's, SGLang's and others'
    "min_tokens": "this server has no minimum length of answers",
    "min_new_tokens": "this server has no minimum length of answers",
    "stop_token_ids": "this server stops at strings only",
    "stop_regex": "this server stops at strings only",
    "bad_words": "this server excludes no words from answers",
    "allowed_token_ids": "this server excludes no tokens from answers",
    "logits_processors": "this server does not process logits",
    "custom_logit_processor": "this server does not process logits",
    "lora_path": "this server has no adapters beside its models",
    "documents": "this server reads none beside the prompt; put their text into it",
    "use_beam_search": "this server samples answers",
    "include_stop_str_in_output": "this server ends an answer before its stop string",
    "truncate_prompt_tokens": "this server does not truncate prompts",
}
_OF_CHATS = _OF_SERVERS | {
    "audio": "this server answers with text only",
    "functions": "declare functions in `tools`",
    "function_call": "choose a function with `tool_choice`",
    "web_search_options": "this server has no web search",
    "prompt_logprobs": "this server has log-probabilities of answers only",
    "echo": "this server does not repeat the prompt in the answer",
    "suffix": "fill in between two texts with Completions",
    "mcp_servers": "this server calls no other servers",
    "container": "this server runs no code",
}
_NO_TOOLS = "a completion calls no tools; declare them in Chat Completions"
_IN_MESSAGES = "send the conversation in `messages`"
_NO_STATE = dict.fromkeys(("previous_response_id", "conversation", "prompt"), _IN_MESSAGES)


def _grammars(reason: str, *more: str) -> dict[str, str]:
    return dict.fromkeys((*_GRAMMARS, *more), reason)


# Format -> field -> reason of the refusal.
REFUSED: Mapping[str, Mapping[str, str]] = {
    "chat.completions": _OF_CHATS
    | _NO_STATE
    | _grammars("ask for JSON of a schema or a regex with `response_format`", "output_format")
    | dict.fromkeys(("system", "instructions"), "send a message of the role system")
    | {
        "logit_bias": "this server adds no bias to logits",
        "stop_sequences": "name stop strings in `stop`",
        "continue_final_message": "begin an answer with `prefix` in the last message",
    },
    "messages": _OF_CHATS
    | _NO_STATE
    | _grammars("ask for JSON of a schema with `output_config.format`", "response_format")
    | dict.fromkeys(("logprobs", "top_logprobs"), "this API has no log-probabilities")
    | {
        "logit_bias": "this server adds no bias to logits here",
        "instructions": "send them in `system`",
        "stop": "name stop strings in `stop_sequences`",
        "continue_final_message": "this API continues no answer; `prefix` in Chat Completions does",
    },
    "responses": _OF_CHATS
    | _grammars("ask for JSON of a schema with `text.format`", "response_format", "output_format")
    | dict.fromkeys(("stop", "stop_sequences"), "this API has no stop strings")
    | {
        "background": "this server answers while the request is open",
        "conversation": "continue a response with `previous_response_id`",
        "prompt": "this server has no stored prompts; send `instructions` and `input`",
        "system": "send it in `instructions`",
        "logit_bias": "this server adds no bias to logits",
        "logprobs": "say their number in `top_logprobs`",
        "continue_final_message": "this API continues no answer",
    },
    "completions": _OF_SERVERS
    | _grammars("a completion has no form; ask for one in Chat Completions", "response_format", "output_format")
    | dict.fromkeys(("tools", "functions"), _NO_TOOLS)
    | dict.fromkeys(("messages", "system", "instructions"), "a completion has no conversation; use Chat Completions")
    | {
        "stop_sequences": "name stop strings in `stop`",
        "prompt_logprobs": "ask for those of the prompt with `echo` and `logprobs`",
        "prompt_embeds": "a prompt is text or token ids",
    },
}
# Objects of other APIs whose `format` is the form of the answer -> the formats that have them.
_FORMS = {"text": ("responses",), "output_config": ("messages",)}


def refuse_foreign(request: Json, name: str) -> None:
    """RequestError 400 for a field that another API knows, and that cannot be done in the format `name`."""
    refuse_wishes(request, REFUSED[name])
    refuse_sampling(request)
    refuse_template(request)
    if name != "completions" and request.get("best_of") not in (None, 1):
        raise invalid("best_of", request["best_of"], "1; several candidates are computed in Completions only")
    if name == "completions" and request.get("tool_choice") and request["tool_choice"] not in _FREE_CHOICES:
        raise unavailable("tool_choice", _NO_TOOLS)
    for field, owners in _FORMS.items():
        value: object = request.get(field)
        if name not in owners and isinstance(value, dict):
            refuse_wishes({f"{field}.format": cast(Json, value).get("format")}, {f"{field}.format": _form(name)})
    modalities: object = request.get("modalities")
    if isinstance(modalities, list) and any(kind != "text" for kind in cast("list[object]", modalities)):
        raise invalid("modalities", cast(object, modalities), '["text"]')


def refuse_template(request: Json) -> None:
    """RequestError 400 for a prompt of another form than the model's."""
    refuse_wishes(request, {"chat_template": "the model's own prompt format is used"})
    if request.get("add_generation_prompt") is False:
        raise invalid("add_generation_prompt", False, "true: a prompt ends where the answer begins")


def _form(name: str) -> str:
    return REFUSED[name]["guided_json"]


def read_max_tokens(request: Json, own: str) -> None:
    """Sets the largest number of tokens from another API's name of it where the request does not say its own."""
    for name in _MAX_TOKENS:
        if request.get(own) is None and request.get(name) is not None:
            request[own] = request[name]


def check_seed(request: Json) -> None:
    """RequestError 400 for a seed out of range, in formats where deepseek-recipe does not read it."""
    seed = request.get("seed")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED):
        raise invalid("seed", seed, f"integers in [0, {MAX_SEED}]")


def refuse_thinking(request: Json, thinking: bool | None, effort: str | None) -> None:
    """RequestError 400 for a wish to think, in Completions."""
    if thinking or (thinking is None and effort not in (None, "none")):
        wishes = ("thinking", "enable_thinking", "reasoning_effort", "reasoning", "output_config")
        name = next((name for name in wishes if request.get(name)), "chat_template_kwargs")
        raise unavailable(name, "a completion is written without thinking; ask for it in Chat Completions")
