"""Records of the rollout queue: what is asked, leased, written and taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dsv4.model.choices import Choices


@dataclass(frozen=True)
class LoggedToken:
    """One generated token: `version` is that of the weights that drew it.

    `mask`: tokens that could be drawn, a bit per token of the vocabulary; None: all. `choices`: of the forward that it
    was drawn from, for the token before it, or for the whole prompt if it is the first; None: not recorded.
    """

    token_id: int
    log_probability: float
    version: int
    mask: bytes | None = None
    choices: Choices | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class NewRequest:
    """A request to ask: `prompt` numbers the prompts of a batch. `params` are keywords of SamplingParams, seed too."""

    prompt: int
    prompt_token_ids: tuple[int, ...]
    params: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.params.get("seed") is None:
            raise ValueError("a request of the queue needs a seed: another worker must draw the same tokens")


@dataclass(frozen=True)
class Lease:
    """A request that a worker may work on until `leased_until`, with the tokens that it has so far."""

    id: int
    attempt: int
    prompt_token_ids: tuple[int, ...]
    params: dict[str, Any]
    tokens: tuple[LoggedToken, ...]


@dataclass(frozen=True)
class Finished:
    """A request that has ended: its tokens, or the error in words that ended it."""

    prompt: int
    prompt_token_ids: tuple[int, ...]
    tokens: tuple[LoggedToken, ...]
    finish_reason: str | None
    error: str | None


@dataclass(frozen=True)
class Step:
    """New tokens of a leased request, from output position `position` on, and its end, if it has ended."""

    lease: Lease
    position: int
    tokens: Sequence[LoggedToken] = ()
    finish_reason: str | None = None
    error: str | None = None
