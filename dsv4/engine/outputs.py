"""Outputs of a request: one RequestOutput, or streamed TokenEvents, with ProgressEvents before them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

EndReason = Literal["stop", "length"]  # of an answer
FinishReason = Literal["stop", "length", "abort"]
Alternatives = tuple[tuple[int, float], ...]  # (token id, log-probability), likeliest first, ties by lower id


@dataclass(frozen=True, slots=True)
class SampledToken:
    """One sampled token. `logprob`, `alternatives` and `mask` are filled only when the request asked for them."""

    token_id: int
    logprob: float | None = None
    alternatives: Alternatives = ()
    mask: bytes | None = None  # tokens that could be drawn, a bit per token of the vocabulary (kernels/sampling)


@dataclass(slots=True)  # not frozen, which would triple the time to make one: there is one per token
class Timings:
    """Durations of a request so far, in seconds of the monotonic clock, and its token counts."""

    queue_seconds: float  # from its arrival to the first step that computes a part of it
    prefill_seconds: float  # from that step to its first token
    decode_seconds: float  # from its first token to its latest; 0 while there is one token only
    num_prompt_tokens: int
    num_cached_tokens: int  # of the prompt, taken from the prefix cache
    num_output_tokens: int
    num_draft_tokens: int = 0  # that were verified
    num_accepted_tokens: int = 0  # of them, those that stand in the output


@dataclass(frozen=True, slots=True)
class ProgressEvent:
    """Progress of a request before its first token."""

    num_prompt_tokens: int
    num_cached_tokens: int  # of the prompt, taken from the prefix cache
    num_computed_tokens: int  # of the prompt, cached ones included
    queue_position: int | None  # number of requests that wait before it; None once it runs
    queue_seconds: float
    prefill_seconds: float


@dataclass(slots=True)  # not frozen, as Timings
class TokenEvent:
    """New tokens of one request. `text` may lag behind the tokens (half a character, a possible stop string)."""

    token_ids: list[int]
    text: str
    logprobs: list[float]  # one per token if requested, else empty
    top_logprobs: list[Alternatives]
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0
    timings: Timings | None = None
    prompt_logprobs: list[float | None] = field(default_factory=list["float | None"])  # with the first token
    prompt_top_logprobs: list[Alternatives] = field(default_factory=list[Alternatives])  # with the first token
    num_accepted_tokens: int = 0  # of token_ids the first ones: drafts that stand


@dataclass
class RequestOutput:
    """One finished request: of a prompt's n outputs the first, which has the others.

    `token_ids` holds every sampled token, the end-of-sentence token too; `text` leaves that token out and ends before
    a matched stop string. `logprobs[i]` and `top_logprobs[i]` belong to `token_ids[i]`, `prompt_logprobs[i]` to
    `prompt_token_ids[i]`, the first of them None; all are empty unless requested. `prompt_top_logprobs` has
    the prompt's alternatives, as many as `top_logprobs`. `sampling_masks[i]` are the tokens that could be drawn for
    `token_ids[i]`, a bit per token of the vocabulary, the first token's the lowest of the first byte; empty unless
    logprobs_mode is "processed_logprobs" and a filter or a constraint may forbid tokens.

    `routed_experts` int16 [tokens, score-routed layers, num_experts_per_tok] and `indexer_topk` int32 [tokens, layers
    with an indexer, index_topk] are what the forwards chose for every token of prompt and output but the last, which
    none has computed; `indexer_topk` is -1 where a token reads all entries. Of an output that ended by itself, where
    the engine's enable_return_routed_experts and enable_return_indexer_topk ask for them.
    """

    prompt_token_ids: list[int]
    token_ids: list[int] = field(default_factory=list[int])
    text: str = ""
    logprobs: list[float] = field(default_factory=list[float])
    top_logprobs: list[Alternatives] = field(default_factory=list[Alternatives])
    finish_reason: FinishReason | None = None
    # The stop string or stop token id that ended it, None at the end of a constraint; of an abort the reason, if any.
    stop_reason: str | int | None = None
    cached_tokens: int = 0  # prompt tokens taken from the prefix cache
    num_draft_tokens: int = 0  # that were verified for it
    num_accepted_tokens: int = 0  # of token_ids, those that were drafted
    timings: Timings | None = None  # None until its first token
    prompt_logprobs: list[float | None] = field(default_factory=list["float | None"])
    prompt_top_logprobs: list[Alternatives] = field(default_factory=list[Alternatives])
    sampling_masks: list[bytes] = field(default_factory=list[bytes])
    routed_experts: np.ndarray | None = None
    indexer_topk: np.ndarray | None = None
    others: list[RequestOutput] = field(default_factory=list["RequestOutput"])  # outputs 1 to n - 1 of the prompt

    @property
    def outputs(self) -> list[RequestOutput]:
        """All outputs of the prompt, this one first."""
        return [self, *self.others]


# Events of a request. Sending True (`complete`) stops it as one that has ended by itself.
TokenStream = AsyncGenerator[TokenEvent, bool | None]
EventStream = AsyncGenerator[TokenEvent | ProgressEvent, bool | None]


async def complete(events: TokenStream | EventStream) -> None:
    """Stops a request of which all that was wanted has come: it counts as "stop", one that is closed as "abort"."""
    with contextlib.suppress(StopAsyncIteration):
        await events.asend(True)
