"""Body of a completion request: its fields, their types and ranges."""

from __future__ import annotations

from typing import Any, cast

from pydantic import BaseModel, ConfigDict, Field, SkipValidation

from dsv4.engine.sampling_params import MAX_SEED
from dsv4.server.errors import RequestError
from dsv4.server.hosted_limits import MAX_ALTERNATIVES, MAX_STOPS, MAX_TOKENS
from dsv4.server.pydantic_refusals import out_of_range, validated, wrong_type
from dsv4.server.schemas import StreamOptions
from dsv4.server.unchecked_json import Json, are_integers
from dsv4.server.wishes import invalid

MAX_OUTPUTS = 128  # of one request

Prompt = str | list[int]


class CompletionBody(BaseModel):
    """A request to continue prompts. Refusals are worded as the hosted service does."""

    model_config = ConfigDict(strict=True, extra="ignore")

    model: str = Field(description="Id of a served model")
    prompt: SkipValidation[str | list[int] | list[str | list[int]]] = Field(
        description="Text or token ids, or a list of prompts"
    )
    add_special_tokens: bool | None = Field(
        None, description="false: no begin-of-sentence token before a prompt of text; true if omitted"
    )
    suffix: str | None = Field(None, description="Text after the completion, which then fills the place between")
    max_tokens: int | None = Field(None, description="At most this many tokens; 0 only with echo", ge=0, le=MAX_TOKENS)
    n: int | None = Field(None, description="Completions per prompt", ge=1, le=MAX_OUTPUTS)
    best_of: int | None = Field(None, description="Candidates, of which the n likeliest per token are returned", ge=1)
    echo: bool | None = Field(None, description="Return the prompt before the completion")
    logprobs: int | None = Field(None, description="Alternatives per token", ge=0, le=MAX_ALTERNATIVES)
    stop: SkipValidation[str | list[str] | None] = Field(None, description="The text ends before the first of these")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, description="0 or -1: no limit", ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    logit_bias: SkipValidation[dict[str, float] | None] = Field(None, description="Token id to bias")
    presence_penalty: float | None = Field(None, description="Has no effect, as in the hosted service", ge=-2, le=2)
    frequency_penalty: float | None = Field(None, description="Has no effect, as in the hosted service", ge=-2, le=2)
    ignore_eos: bool | None = None
    user: str | None = None
    user_id: Any = None
    cache_salt: str | None = None

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts, a lone one as a list of one. A list of numbers is one prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [cast("list[int]", self.prompt)]
        return cast("list[Prompt]", self.prompt)

    @property
    def begins(self) -> bool:
        """True if a begin-of-sentence token stands before prompts of text."""
        return self.add_special_tokens is not False

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def num_outputs(self) -> int:
        """Completions that are returned per prompt."""
        return self.n or 1

    @property
    def num_candidates(self) -> int:
        """Completions that are computed per prompt."""
        return self.best_of or self.num_outputs


def read_completion_body(request: Json) -> CompletionBody:
    """Checks a request. RequestError 400 names the field."""
    body = validated(CompletionBody, request, _RANGES)
    _check_prompt(body.prompt)
    _check_stops(body.stop)
    _check_bias(body.logit_bias)
    _check_together(body)
    return body


# Ranges as the hosted service words them.
_RANGES = {
    "max_tokens": f"[1, {MAX_TOKENS}]",
    "temperature": "[0, 2]",
    "top_p": "(0, 1.0]",
    "presence_penalty": "[-2, 2]",
    "frequency_penalty": "[-2, 2]",
    "logprobs": f"[0, {MAX_ALTERNATIVES}]",
}


def _check_prompt(value: object) -> None:
    """RequestError 400 for what is no prompt and no list of a few."""
    if isinstance(value, str) or are_integers(value):
        return
    items = cast("list[object]", value) if isinstance(value, list) else []
    if len(items) > MAX_OUTPUTS:
        raise _too_many(len(items), "prompt")
    if not items or not all(isinstance(item, str) or are_integers(item) for item in items):
        raise wrong_type("prompt", cast(object, value), "a text, token ids, or a list of these")


def _check_stops(value: object) -> None:
    """RequestError 400 for what is no text, and no list of a few."""
    items = cast("list[object]", value) if isinstance(value, list) else [] if value is None else [value]
    if len(items) > MAX_STOPS:
        raise RequestError(400, f"Stop string array too long: {len(items)}", param="stop")
    for place, text in enumerate(items):
        if not isinstance(text, str):
            raise wrong_type("stop", cast(object, value), "a valid string")
        if not text:
            raise RequestError(400, f"Invalid 'stop[{place}]': empty string", param="stop")


def _check_bias(value: object) -> None:
    """RequestError 400 for what is no object of numbers. Its tokens and their range are the model's to check."""
    if value is None:
        return
    if not isinstance(value, dict):
        raise wrong_type("logit_bias", value, "a valid dictionary")
    if not {*map(type, cast(Json, value).values())} <= {int, float}:
        raise wrong_type("logit_bias", cast(object, value), "a valid number")


def _check_together(body: CompletionBody) -> None:
    """RequestError 400 for values that do not fit together, or that no type excludes."""
    if body.max_tokens == 0 and not body.echo:
        raise out_of_range("max_tokens", _RANGES["max_tokens"])
    if not body.prompts or any(prompt == [] for prompt in body.prompts):
        raise RequestError(400, "Invalid prompt: an empty list; allowed: at least 1 prompt of 1 token", param="prompt")
    if not body.begins and body.suffix is None and "" in body.prompts:
        raise RequestError(400, "Invalid prompt: an empty text, and add_special_tokens is false", param="prompt")
    if body.suffix is not None and not all(isinstance(prompt, str) for prompt in body.prompts):
        raise RequestError(400, "suffix needs a prompt of text, not of token ids", param="suffix")
    if body.suffix is not None and body.echo:
        raise RequestError(400, "echo is unavailable with suffix: the completion stands inside the text", param="echo")
    if body.stream_options is not None and not body.stream:
        raise RequestError(400, "stream_options should be set along with stream = true", param="stream_options")
    if body.num_candidates < body.num_outputs:
        raise invalid("best_of", body.best_of, f"n ({body.num_outputs}) or more")
    if body.num_candidates > body.num_outputs and body.stream:
        raise RequestError(400, "best_of is unavailable with stream: the best is known at the end", param="best_of")
    if body.num_candidates * len(body.prompts) > MAX_OUTPUTS:
        name = "best_of" if body.num_candidates > body.num_outputs else "n" if body.num_outputs > 1 else "prompt"
        raise _too_many(body.num_candidates * len(body.prompts), name)


def _too_many(count: int, name: str) -> RequestError:
    return RequestError(400, f"The request asks for {count} completions; allowed: {MAX_OUTPUTS}", param=name)
