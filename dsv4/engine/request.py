"""One request inside the engine: its tokens, how much of it the cache holds, and when it ends."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

import numpy as np

from dsv4.cache import PrefixEntry, SavedRow
from dsv4.cache.disk import DiskLookup
from dsv4.engine.fairness import User
from dsv4.engine.logits import LogitsProcessor
from dsv4.engine.outputs import (
    Alternatives,
    FinishReason,
    ProgressEvent,
    RequestOutput,
    SampledToken,
    Timings,
    TokenEvent,
)
from dsv4.engine.sampling_params import SamplingParams
from dsv4.engine.stop_strings import StopMatcher
from dsv4.model.choices import RecordedChoices


class TextDecoder(Protocol):
    """Turns token ids into text one at a time (`Tokenizer.decode_stream`); never gives out half a character."""

    def push(self, token_id: int, /) -> str: ...

    def flush(self) -> str: ...


class Constraint(Protocol):
    """Tokens that may follow the output (`constraint.Constraint`)."""

    @property
    def complete(self) -> bool: ...

    @property
    def error(self) -> str | None: ...

    def advance(self, token_id: int, /) -> None: ...

    def masks(self, draft_token_ids: Sequence[int], /) -> list[np.ndarray | None]: ...


class RequestStatus(Enum):
    NEW = "new"  # not queued yet
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Request:
    """The state of one request.

    The scheduler owns status; the cache manager slot and what stands below it; the core num_computed_tokens, which the
    cache manager sets when the request begins.
    """

    request_id: int
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    stop_token_ids: frozenset[int]  # the end-of-sentence token too, unless the request ignores it
    max_total_tokens: int  # where the output ends; a prompt that fills it still gets one token
    decoder: TextDecoder | None = None  # None: a model without a tokenizer
    processors: tuple[LogitsProcessor, ...] = ()  # of its logits, in their order
    constraint: Constraint | None = None  # of what it may write, where its output is now
    user: User = ("",)  # who shares the engine with others by what each was served
    takes_turns: bool = False  # True: it gives its row to one that waits when it has run long enough
    max_chunk_tokens: int | None = None  # tokens of it that a step computes at most
    text_vocab_size: int = 0  # ids from here on pad the vocabulary: the decoder does not know them
    status: RequestStatus = RequestStatus.NEW
    slot: int = -1  # the cache row, while running
    prefix: PrefixEntry | None = None  # the stored prefix that its row began with
    on_disk: DiskLookup | None = None  # where there is a disk cache
    common_tokens: int = 0  # of the prompt, in whole blocks that stored prefixes had too when it began
    shared_tokens: int = 0  # of the prompt, in whole blocks: stored for another that waits for them
    saved: SavedRow | None = None  # all that its row held, while it waits to go on
    draft_token_ids: tuple[int, ...] = ()  # guesses of its next tokens, for the next step that decodes it
    num_computed_tokens: int = 0  # tokens whose keys and state the cache row holds
    arrival_time: float = field(default_factory=time.monotonic)
    scheduled_time: float | None = None  # when the first step that computes a part of it began
    first_token_time: float | None = None
    choices: RecordedChoices = field(default_factory=RecordedChoices)  # where they are recorded
    output: RequestOutput = field(init=False)
    output_counts: Counter[int] = field(init=False)  # of the output's tokens, kept where there are processors
    _stops: StopMatcher = field(init=False)

    def __post_init__(self) -> None:
        self.output = RequestOutput(self.prompt_token_ids)
        if self.params.prompt_logprobs:
            self.output.prompt_logprobs.append(None)
            self.output.prompt_top_logprobs.append(())
        self.output_counts = Counter()
        self._stops = StopMatcher(self.params.stop_strings)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output.token_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        return self.num_tokens - self.num_computed_tokens

    @property
    def finished(self) -> bool:
        return self.output.finish_reason is not None

    def tokens(self, start: int, stop: int) -> list[int]:
        """Token ids of positions start to stop over prompt and output."""
        prompt = len(self.prompt_token_ids)
        return self.prompt_token_ids[start:stop] + self.output.token_ids[max(start - prompt, 0) : max(stop - prompt, 0)]

    def add_prompt_logprobs(self, position: int, logprobs: list[float], alternatives: list[Alternatives]) -> None:
        """Takes in log-probabilities of the prompt's tokens from `position` on; those that are known stay."""
        known = self.output.prompt_logprobs
        assert position <= len(known), "no part of a prompt that is scored is skipped"
        new = len(known) - position
        known += logprobs[new:]
        self.output.prompt_top_logprobs += alternatives[new:]

    def mark_scheduled(self, now: float) -> None:
        """Notes when its computation began; only the first call counts."""
        if self.scheduled_time is None:
            self.scheduled_time = now

    def progress(self, now: float, queue_position: int | None) -> ProgressEvent:
        """Progress at `now`, before the first token; `queue_position` is None once the request runs."""
        scheduled = now if self.scheduled_time is None else self.scheduled_time
        end = now if self.first_token_time is None else self.first_token_time
        prompt = len(self.prompt_token_ids)
        return ProgressEvent(
            num_prompt_tokens=prompt,
            num_cached_tokens=self.output.cached_tokens,
            num_computed_tokens=min(self.num_computed_tokens, prompt),
            queue_position=queue_position,
            queue_seconds=scheduled - self.arrival_time,
            prefill_seconds=end - scheduled,
        )

    def append(self, sampled: list[SampledToken], now: float, num_draft_tokens: int = 0) -> TokenEvent:
        """Takes in the tokens sampled at `now`, at least one, up to the one that ends the request; drops the rest.

        All but the last of `sampled` are drafts, of `num_draft_tokens` that were verified. Returns what is new to show.
        """
        output, text = self.output, ""
        first = not output.token_ids
        token_ids: list[int] = []
        logprobs: list[float] = []
        alternatives: list[Alternatives] = []
        for token in sampled:
            token_ids.append(token.token_id)
            if token.logprob is not None:
                logprobs.append(token.logprob)
                alternatives.append(token.alternatives)
            if token.mask is not None:
                output.sampling_masks.append(token.mask)
            text += self._take(token.token_id)
            if self.finished:
                text += self._flush_text()
                break
        output.text += text
        accepted = min(len(sampled) - 1, len(token_ids))
        output.num_draft_tokens += num_draft_tokens
        output.num_accepted_tokens += accepted
        output.timings = timings = self._timings(now)
        output.logprobs += logprobs
        output.top_logprobs += alternatives
        return TokenEvent(
            token_ids=token_ids,
            text=text,
            logprobs=logprobs,
            top_logprobs=alternatives,
            finish_reason=output.finish_reason,
            cached_tokens=output.cached_tokens,
            timings=timings,
            prompt_logprobs=list(output.prompt_logprobs) if first else [],
            prompt_top_logprobs=list(output.prompt_top_logprobs) if first else [],
            num_accepted_tokens=accepted,
        )

    def _take(self, token_id: int) -> str:
        """Adds one token to the output, decides whether the request ends with it, and returns its text to show."""
        token_ids = self.output.token_ids
        token_ids.append(token_id)
        if self.processors:
            self.output_counts[token_id] += 1
        if self.constraint is not None:
            self.constraint.advance(token_id)
            if self.constraint.error is not None:
                self._finish("abort", f"the constraint cannot be followed: {self.constraint.error}")
                return ""
        if token_id in self.stop_token_ids:
            self._finish("stop", token_id)
            return ""
        text = ""
        if self.decoder and token_id < self.text_vocab_size and token_id not in self.params.hidden_token_ids:
            text = self._stops.push(self.decoder.push(token_id))
        if self._stops.matched is not None:
            self._finish("stop", self._stops.matched)
        elif self.constraint is not None and self.constraint.complete:
            self._finish("stop", None)
        elif len(token_ids) >= self.params.max_tokens or self.num_tokens >= self.max_total_tokens:
            self._finish("length", None)
        return text

    def abort(self, reason: FinishReason = "abort") -> None:
        if not self.finished:
            self.output.text += self._flush_text()
            self._finish(reason, None)

    def _timings(self, now: float) -> Timings:
        if self.first_token_time is None:
            self.first_token_time = now
        scheduled = now if self.scheduled_time is None else self.scheduled_time
        return Timings(
            queue_seconds=scheduled - self.arrival_time,
            prefill_seconds=self.first_token_time - scheduled,
            decode_seconds=now - self.first_token_time,
            num_prompt_tokens=len(self.prompt_token_ids),
            num_cached_tokens=self.output.cached_tokens,
            num_output_tokens=len(self.output.token_ids),
            num_draft_tokens=self.output.num_draft_tokens,
            num_accepted_tokens=self.output.num_accepted_tokens,
        )

    def _finish(self, reason: FinishReason, cause: str | int | None) -> None:
        self.output.finish_reason, self.output.stop_reason = reason, cause

    def _flush_text(self) -> str:
        """The end of the text: what the decoder and the stop matcher still hold back.

        It may end with a stop string, of which half a character is a part; then that has ended the request.
        """
        shown = self._stops.push(self.decoder.flush()) if self.decoder else ""
        if self._stops.matched is not None and self.output.finish_reason in ("stop", "length"):
            self._finish("stop", self._stops.matched)
        return shown + self._stops.flush()
