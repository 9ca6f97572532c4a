"""What a request gives back: a whole RequestOutput, or TokenEvents as they come."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort"]
Alternatives = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class TokenEvent:
    """New tokens of one request. `text` may lag behind the tokens (half a character, a possible stop string)."""

    token_ids: list[int]
    text: str
    logprobs: list[float]  # one a token when asked for, else empty
    top_logprobs: list[Alternatives]
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0


@dataclass
class RequestOutput:
    """One finished request.

    `token_ids` holds every sampled token, the end-of-sentence token too; `text` leaves that one out, and ends before
    the stop string that ended it. `logprobs[i]` belongs to `token_ids[i]`; both lists are empty unless asked for.
    """

    prompt_token_ids: list[int]
    token_ids: list[int] = field(default_factory=list[int])
    text: str = ""
    logprobs: list[float] = field(default_factory=list[float])
    top_logprobs: list[Alternatives] = field(default_factory=list[Alternatives])
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # the stop string or the stop token that ended it
    cached_tokens: int = 0  # prompt tokens that were not computed again
