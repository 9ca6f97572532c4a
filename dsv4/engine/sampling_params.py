"""SamplingParams: how one request turns logits into tokens and when it ends. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from dsv4.text import check_text
from dsv4.tools import Tool, ToolChoice, check_tools

LogprobsMode = Literal["raw_logprobs", "tempered_logprobs", "processed_logprobs"]

MAX_SEED = 2**63 - 1
CONSTRAINTS = ("json_schema", "json_object", "regex", "choice", "grammar")  # fields; at most one is set
BESIDE_TOOLS = ("json_schema", "json_object")  # of these, those that the text beside tool calls may have


@dataclass(frozen=True)
class SamplingParams:
    """One request's sampling and stopping rules; a bad value raises ValueError naming it and what is allowed.

    The order is logit_bias, presence_penalty and frequency_penalty, the constraint (see logits.py), temperature, top_k,
    top_p, min_p (see sampler.py). Log-probabilities are those of the model before any of them; those of the tokens that
    are sampled may also be taken after temperature (logprobs_mode "tempered_logprobs"), or of the distribution that
    is drawn from ("processed_logprobs"): after all of them, and the output has the tokens kept, `sampling_masks`.

    A constraint (one of json_schema, json_object, regex, choice, grammar) holds for the whole output: the text is one
    that it allows, unless the request is cut off (finish reason "length"). The request ends where nothing but the end
    of the sentence may follow, or where that is sampled, with ignore_eos too. Until the constraint begins (see
    grammar_after) the output is any text, and does not end.

    tools: the output is text, or calls of these in the model's own markup; tool_choice says whether it has to call
    ("required", or {"name": ...} for one of them), may ("auto") or may not ("none"). With json_schema or json_object
    the text beside calls is JSON of that kind.
    """

    max_tokens: int = 256
    temperature: float = 1.0  # 0 is greedy: the largest logit, the lower id on a tie
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    min_p: float = 0.0  # drop tokens less likely than min_p times the most likely one
    seed: int | None = None  # None: a fresh random seed for each request
    stop: str | tuple[str, ...] | list[str] | None = ()  # the text ends before the first of these
    stop_token_ids: tuple[int, ...] = ()  # end like the end-of-sentence token does
    ignore_eos: bool = False
    hidden_token_ids: Collection[int] = ()  # have no text, like an end of the sentence that is ignored
    logprobs: bool | int = False  # True: of the sampled tokens; an int: that many alternatives a token as well
    logprobs_mode: LogprobsMode = "raw_logprobs"
    prompt_logprobs: bool = False  # of the prompt's tokens
    n: int = 1  # outputs of one prompt; output i is the same whatever n is
    presence_penalty: float = 0.0  # subtracted from the logits of tokens that the output has
    frequency_penalty: float = 0.0  # subtracted for each time that the output has the token
    logit_bias: Mapping[int, float] | None = None  # token id -> added to its logit
    json_schema: dict[str, Any] | str | None = None  # a JSON object, or its text
    json_object: bool = False  # any JSON object
    regex: str | None = None  # in the syntax of Rust's regex crate; the whole text matches
    choice: Sequence[str] | None = None  # one of these
    grammar: str | None = None  # in llguidance's variant of Lark; its rule `start`
    tools: Sequence[Tool | Mapping[str, Any]] | None = None  # None: no constraint; none of them: no call
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True  # False: one call at most
    tool_block_open: bool = False  # the prompt ends behind the tag that begins the calls
    grammar_after: tuple[int, ...] = ()  # the constraint begins after the first of these tokens; empty: at once
    cache_salt: str | None = None  # prefixes are shared only among requests of the same one

    def __post_init__(self) -> None:
        _check_int("max_tokens", self.max_tokens, 1, None)
        _check_float("temperature", self.temperature, "[0, inf)", lambda value: value >= 0.0)
        _check_float("top_p", self.top_p, "(0, 1]", lambda value: 0.0 < value <= 1.0)
        _check_int("top_k", self.top_k, 0, None)
        _check_float("min_p", self.min_p, "[0, 1]", lambda value: 0.0 <= value <= 1.0)
        if self.seed is not None:
            _check_int("seed", self.seed, 0, MAX_SEED)
        if not isinstance(self.logprobs, bool):
            _check_int("logprobs", self.logprobs, 0, None)
        if self.logprobs_mode not in get_args(LogprobsMode):
            allowed = ", ".join(get_args(LogprobsMode))
            raise ValueError(f"SamplingParams.logprobs_mode is {self.logprobs_mode!r}; allowed: {allowed}")
        if self.logprobs_mode != "raw_logprobs" and self.temperature == 0.0:
            raise ValueError(
                f"SamplingParams.logprobs_mode is {self.logprobs_mode} at temperature 0; allowed: raw_logprobs"
            )
        if not isinstance(self.stop, (str, tuple, list, type(None))):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"SamplingParams.stop is {self.stop!r}; allowed: a string, a list of strings or None")
        if self.cache_salt is not None and (not isinstance(self.cache_salt, str) or not self.cache_salt):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(
                f"SamplingParams.cache_salt is {self.cache_salt!r}; allowed: a string of at least 1 character, or None"
            )
        if self.cache_salt is not None:
            check_text(self.cache_salt, "SamplingParams.cache_salt")
        for name in ("stop_token_ids", "hidden_token_ids"):
            if not isinstance(getattr(self, name), Collection):
                raise ValueError(f"SamplingParams.{name} is {getattr(self, name)!r}; allowed: a list of token ids")
            for place, token in enumerate(getattr(self, name)):
                _check_int(f"{name}[{place}]", token, 0, None)
        for place, text in enumerate(self.stop_strings):
            if not isinstance(text, str) or not text:  # pyright: ignore[reportUnnecessaryIsInstance]
                raise ValueError(f"SamplingParams.stop[{place}] is {text!r}; allowed: strings of at least 1 character")
            check_text(text, f"SamplingParams.stop[{place}]")
        _check_int("n", self.n, 1, None)
        _check_float("presence_penalty", self.presence_penalty, "[-2, 2]", lambda value: -2.0 <= value <= 2.0)
        _check_float("frequency_penalty", self.frequency_penalty, "[-2, 2]", lambda value: -2.0 <= value <= 2.0)
        if not isinstance(self.logit_bias, (Mapping, type(None))):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"SamplingParams.logit_bias is {self.logit_bias!r}; allowed: a dict of token ids, or None")
        for token, bias in (self.logit_bias or {}).items():
            _check_int("logit_bias's token id", token, 0, None)
            _check_float(f"logit_bias[{token}]", bias, "[-100, 100]", lambda value: -100.0 <= value <= 100.0)
        for name in ("ignore_eos", "prompt_logprobs", "json_object", "parallel_tool_calls", "tool_block_open"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"SamplingParams.{name} is {getattr(self, name)!r}; allowed: True or False")
        self._check_constraint()

    def _check_constraint(self) -> None:
        given = [name for name in CONSTRAINTS if self._has(name)]
        if len(given) > 1:
            raise ValueError(f"SamplingParams has {' and '.join(given)}; allowed: one of {', '.join(CONSTRAINTS)}")
        if self.tools is None and (self.tool_choice != "auto" or not self.parallel_tool_calls or self.tool_block_open):
            raise ValueError("SamplingParams.tool_choice, parallel_tool_calls or tool_block_open is set without tools")
        if self.tools is not None and not set(given) <= set(BESIDE_TOOLS):
            raise ValueError(
                f"SamplingParams has tools and {given[0]}; allowed: {' or '.join(BESIDE_TOOLS)} beside tools"
            )
        if self.tool_block_open and not self.callable_tools:
            raise ValueError("SamplingParams.tool_block_open is set, but no tool may be called")
        _ = self.callable_tools  # which checks them
        if self.grammar_after and not self.is_constrained:
            raise ValueError("SamplingParams.grammar_after is set without a constraint to begin")
        for place, token in enumerate(self.grammar_after):
            _check_int(f"grammar_after[{place}]", token, 0, None)
        for name in ("regex", "grammar"):
            if getattr(self, name) is not None:
                _check_text(name, getattr(self, name))
        if self.choice is not None:
            if isinstance(self.choice, str) or not self.choice:
                raise ValueError(f"SamplingParams.choice is {self.choice!r}; allowed: a list of at least 1 string")
            for place, text in enumerate(self.choice):
                _check_text(f"choice[{place}]", text)
        _ = self.schema  # which checks it

    @property
    def schema(self) -> dict[str, Any] | None:
        """`json_schema` as a dict of its own. ValueError unless it is a JSON object."""
        if self.json_schema is None:
            return None
        try:
            given = self.json_schema
            value = json.loads(given if isinstance(given, str) else json.dumps(given, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"SamplingParams.json_schema is no JSON: {error}") from error
        if not isinstance(value, dict):
            raise ValueError(f"SamplingParams.json_schema is {value!r}; allowed: a JSON object")
        return cast("dict[str, Any]", value)

    @property
    def callable_tools(self) -> tuple[Tool, ...]:
        """The tools that the output may call. ValueError for bad ones."""
        return () if self.tools is None else check_tools(self.tools, self.tool_choice)

    @property
    def is_constrained(self) -> bool:
        return self.tools is not None or any(map(self._has, CONSTRAINTS))

    def _has(self, constraint: str) -> bool:
        return self.json_object if constraint == "json_object" else getattr(self, constraint) is not None

    @property
    def constraint_field(self) -> str:
        """Field that an error about the constraint names; there is one."""
        return "tools" if self.tools is not None else next(filter(self._has, CONSTRAINTS))

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not False

    @property
    def truncates(self) -> bool:
        """True if top_k, top_p or min_p may forbid a token."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0

    @property
    def num_alternatives(self) -> int:
        """Number of the most likely tokens that are reported beside each sampled one."""
        return 0 if isinstance(self.logprobs, bool) else self.logprobs


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise ValueError(f"SamplingParams.{name} is {value!r}; allowed: a string of at least 1 character")
    check_text(value, f"SamplingParams.{name}")


def _check_int(name: str, value: int, low: int, high: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"SamplingParams.{name} is {value!r}; it must be an integer")
    if value < low or (high is not None and value > high):
        bound = f"[{low}, {high}]" if high is not None else f"{low} or more"
        raise ValueError(f"SamplingParams.{name} is {value}; allowed: {bound}")


def _check_float(name: str, value: float, allowed: str, ok: Callable[[float], bool]) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"SamplingParams.{name} is {value!r}; it must be a number")
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an integer that no float can be
        finite = False
    if not finite or not ok(value):
        raise ValueError(f"SamplingParams.{name} is {value}; allowed: {allowed}")
