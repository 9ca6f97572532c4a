"""SamplingParams: how one request turns logits into tokens and when it ends. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from dsv4.text import check_text

MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class SamplingParams:
    """One request's sampling and stopping rules; a bad value raises ValueError naming it and what is allowed.

    The order is temperature, top_k, top_p, min_p (see sampler.py). Log-probabilities are those of the model before any
    of them.
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
    logprobs: bool | int = False  # True: of the sampled tokens; an int: that many alternatives a token as well
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
        if not isinstance(self.stop, (str, tuple, list, type(None))):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"SamplingParams.stop is {self.stop!r}; allowed: a string, a list of strings or None")
        if self.cache_salt is not None and (not isinstance(self.cache_salt, str) or not self.cache_salt):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(
                f"SamplingParams.cache_salt is {self.cache_salt!r}; allowed: a string of at least 1 character, or None"
            )
        for place, text in enumerate(self.stop_strings):
            if not isinstance(text, str) or not text:  # pyright: ignore[reportUnnecessaryIsInstance]
                raise ValueError(f"SamplingParams.stop[{place}] is {text!r}; allowed: strings of at least 1 character")
            check_text(text, f"SamplingParams.stop[{place}]")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not False

    @property
    def num_alternatives(self) -> int:
        """How many of the most likely tokens are reported beside each sampled one."""
        return 0 if isinstance(self.logprobs, bool) else self.logprobs


def _check_int(name: str, value: int, low: int, high: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"SamplingParams.{name} is {value!r}; it must be an integer")
    if value < low or (high is not None and value > high):
        bound = f"[{low}, {high}]" if high is not None else f"{low} or more"
        raise ValueError(f"SamplingParams.{name} is {value}; allowed: {bound}")


def _check_float(name: str, value: float, allowed: str, ok: Callable[[float], bool]) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"SamplingParams.{name} is {value!r}; it must be a number")
    if not math.isfinite(value) or not ok(value):
        raise ValueError(f"SamplingParams.{name} is {value}; allowed: {allowed}")
