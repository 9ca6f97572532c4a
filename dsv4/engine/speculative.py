"""Speculative decoding: the MTP block guesses the next tokens, the main model checks all guesses in one step.

Drafts and the main model choose by the same sampler with the same parameters, seed and position, each from its own
logits; a draft stands where the main model chooses the same token. Every token that comes out is the main model's own
choice, so that the output has the very bits of one without drafts, greedy, sampled or constrained.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from math import isfinite
from typing import Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from dsv4.cache import Cache, RowLog
from dsv4.config import WINDOW
from dsv4.engine.draft_length import DraftLength
from dsv4.engine.metrics import Metric, counter, labelled
from dsv4.engine.model import DraftingModel
from dsv4.engine.request import Request
from dsv4.engine.sampler import SampleRequest, sample
from dsv4.engine.sampling_params import SamplingParams
from dsv4.engine.step import ScheduledChunk, sample_request
from dsv4.model.batch import RaggedBatch


@dataclass
class SpeculationStats:
    """Counts since the engine was made. Position 0 is that of the first draft token of a step."""

    num_drafts: int = 0  # steps of a request that verified draft tokens
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_draft_tokens_per_pos: list[int] = field(default_factory=list[int])
    num_accepted_tokens_per_pos: list[int] = field(default_factory=list[int])

    def count(self, proposed: int, accepted: int) -> None:
        """Takes in one request's step, of whose draft tokens the first `accepted` stand."""
        missing = max(0, proposed - len(self.num_draft_tokens_per_pos))
        self.num_draft_tokens_per_pos += [0] * missing
        self.num_accepted_tokens_per_pos += [0] * missing
        self.num_drafts += 1
        self.num_draft_tokens += proposed
        self.num_accepted_tokens += accepted
        for place in range(proposed):
            self.num_draft_tokens_per_pos[place] += 1
            self.num_accepted_tokens_per_pos[place] += place < accepted

    @property
    def acceptance_rate_per_pos(self) -> list[float]:
        """Share of the draft tokens at each position that stand."""
        pairs = zip(self.num_accepted_tokens_per_pos, self.num_draft_tokens_per_pos, strict=True)
        return [accepted / proposed for accepted, proposed in pairs]


class Drafter(Protocol):
    """Guesses tokens. The requests have cache rows, which hold their computed tokens and nothing else."""

    def take_in(self, chunks: Sequence[ScheduledChunk], streams: Tensor, /) -> None:
        """After a step: streams [T, hc_mult, d] of all its tokens, drafts included; those computed stand."""
        ...

    def catch_up(self, request: Request, /) -> None:
        """Before a request's row is copied: make its state complete, so that others can draft from there."""
        ...

    def propose(self, wanted: Mapping[Request, int], /) -> dict[Request, list[int]]:
        """Guesses of the tokens after the last one of each request, which is not computed yet; `wanted` at most."""
        ...


class Speculator:
    """Drafts after each step for the next one, and counts what stands."""

    def __init__(self, drafter: Drafter, lengths: DraftLength) -> None:
        self.drafter = drafter
        self.lengths = lengths
        self.stats = SpeculationStats()
        self._follows = True
        self._rest = 0  # steps without drafts that are left
        self._rested = 0  # and those that have gone by
        self._resting = 0  # requests of each of them

    def follows(self) -> bool:
        """True if the next step should keep its streams for `take_in`; without them it is followed by no drafts."""
        self._follows = not self._rest and self.lengths.following
        return self._follows

    def take_in(self, chunks: Sequence[ScheduledChunk], streams: Tensor) -> None:
        self.drafter.take_in(chunks, streams)

    def count(self, proposed: int, accepted: int) -> None:
        self.stats.count(proposed, accepted)
        self.lengths.count(proposed, accepted)

    def metrics(self) -> Iterator[Metric]:
        stats, kept = self.stats, "Drafted tokens that were kept"
        yield counter("vllm:spec_decode_num_drafts", "Times that tokens were drafted.", stats.num_drafts)
        yield counter("vllm:spec_decode_num_draft_tokens", "Tokens that were drafted.", stats.num_draft_tokens)
        yield counter("vllm:spec_decode_num_accepted_tokens", f"{kept}.", stats.num_accepted_tokens)
        by_position = ((str(place), float(count)) for place, count in enumerate(stats.num_accepted_tokens_per_pos))
        name = "vllm:spec_decode_num_accepted_tokens_per_pos"
        yield labelled("counter", name, f"{kept}, by position in the draft.", "position", by_position)

    def before_snapshot(self, request: Request) -> None:
        """For the cache manager: see Drafter.catch_up. While drafts do not pay, states are stored without MTP's."""
        if self.lengths.drafting:
            self.drafter.catch_up(request)

    def draft(self, chunks: Sequence[ScheduledChunk], started: float) -> None:
        """After a step that began at `started`: gives each request that decodes next its draft tokens."""
        if self._rests(len(chunks)):
            return
        requests = [chunk.request for chunk in chunks if chunk.num_samples and not chunk.request.finished]
        now = time.monotonic()
        if all(chunk.stop - chunk.start == 1 and chunk.num_samples for chunk in chunks):
            self.lengths.time_step(sum(chunk.num_tokens for chunk in chunks), now - started)
        length = self.lengths.choose(len(requests)) if requests else 0
        if not length and requests:
            self._rest, self._resting = self.lengths.rest(), len(requests)
        if not length or not self._follows:
            return
        wanted = {r: count for r in requests if (count := min(length, _most_drafts(r))) > 0}
        if not wanted:
            return
        for request, tokens in self.drafter.propose(wanted).items():
            request.draft_token_ids = tuple(tokens)
        self.lengths.time_drafting(len(wanted), max(wanted.values()), time.monotonic() - now)

    def _rests(self, num_chunks: int) -> bool:
        """True for a step that is not looked at, as drafts do not pay; the rest ends where other requests run."""
        if self._rest and num_chunks == self._resting:
            self._rest -= 1
            self._rested += 1
            return True
        if self._rested:
            self.lengths.rested(self._resting, self._rested)
        self._rest = self._rested = 0
        return False


class MTPDrafter:
    """Drafts by the MTP block: its entry at a position reads the streams there and the token that follows.

    More than one draft: the block reads its own streams and its own drafts; those entries are undone. Of a model with
    several MTP blocks the first drafts all.
    """

    def __init__(self, model: DraftingModel, cache: Cache) -> None:
        self.model = model
        self.cache = cache
        self.state = cache.keep_streams(model.dtype)
        self._log = RowLog(self.state.layers)
        self._params: WeakKeyDictionary[Request, SamplingParams] = WeakKeyDictionary()

    @torch.inference_mode()
    def take_in(self, chunks: Sequence[ScheduledChunk], streams: Tensor) -> None:
        streams = streams.to(self.state.streams.dtype)
        first = 0
        for chunk in chunks:
            if self.state.ends[chunk.request.slot] != chunk.start:  # steps in between kept no streams
                self.state.restart(chunk.request.slot, chunk.start)
            stop = chunk.request.num_computed_tokens
            start = max(chunk.start, stop - WINDOW)
            offset = first - chunk.start
            self.state.store(chunk.request.slot, start, streams[offset + start : offset + stop])
            first += chunk.num_tokens

    @torch.inference_mode()
    def catch_up(self, request: Request) -> None:
        length = request.num_computed_tokens
        if self.state.ends[request.slot] == length and length - 1 > self.state.read[request.slot]:
            self._read([request], [length - 1])

    @torch.inference_mode()
    def propose(self, wanted: Mapping[Request, int]) -> dict[Request, list[int]]:
        going = list(wanted)
        drafts: dict[Request, list[int]] = {request: [] for request in going}
        streams = self._read(going, [request.num_computed_tokens for request in going])
        ahead = [request for request in going if wanted[request] > 1]
        for request in ahead:
            self._log.keep(request.slot, request.num_computed_tokens, wanted[request] - 1)
        while going:
            rows: list[int] = []
            for row, (request, token) in enumerate(zip(going, self._choose(streams, going, drafts), strict=True)):
                if token is None:
                    continue
                drafts[request].append(token)
                if len(drafts[request]) < wanted[request] and token not in request.stop_token_ids:
                    rows.append(row)
            if rows:
                kept = streams if len(rows) == len(going) else streams[torch.tensor(rows, device=streams.device)]
                going = [going[row] for row in rows]
                starts = [request.num_computed_tokens + len(drafts[request]) - 1 for request in going]
                streams = self._run([[drafts[request][-1]] for request in going], starts, going, kept)
            else:
                going = []
        for request in ahead:
            end = request.num_computed_tokens + wanted[request] - 1
            self._log.put_back(request.slot, request.num_computed_tokens, end)
        return drafts

    def _read(self, requests: Sequence[Request], stops: Sequence[int]) -> Tensor:
        """Lets the block read each request up to entry stop - 1. Returns that entry's streams [n, hc_mult, d]."""
        state = self.state
        # What lies before the window of the row's last token is never seen.
        starts = [max(state.read[r.slot], r.num_computed_tokens - WINDOW) for r in requests]
        lengths = [stop - start for start, stop in zip(starts, stops, strict=True)]
        tokens = [r.tokens(start + 1, stop + 1) for r, start, stop in zip(requests, starts, stops, strict=True)]
        slots = np.repeat([request.slot for request in requests], lengths)
        positions = np.concatenate([np.arange(start, stop) for start, stop in zip(starts, stops, strict=True)])
        streams = self._run(tokens, starts, requests, state.streams[state.rows(slots, positions)])
        for request, stop in zip(requests, stops, strict=True):
            state.read[request.slot] = stop
        if len(streams) == len(requests):
            return streams
        return streams[torch.tensor([end - 1 for end in accumulate(lengths)], device=streams.device)]

    def _run(
        self, tokens: Sequence[Sequence[int]], starts: Sequence[int], requests: Sequence[Request], streams: Tensor
    ) -> Tensor:
        slots = [request.slot for request in requests]
        batch = RaggedBatch.pack(tokens, starts, slots, device=streams.device)
        return self.model.mtp_forward(streams, batch.token_ids, batch, self.cache)

    def _choose(
        self, streams: Tensor, requests: Sequence[Request], drafts: Mapping[Request, list[int]]
    ) -> list[int | None]:
        """The next draft token of each request; None where there is nothing to choose from."""
        logits = self.model.mtp_logits(streams)
        sound = [isfinite(float(largest)) for largest in logits.amax(dim=1).cpu()]
        if not all(sound):
            logits = logits[torch.tensor(sound, device=logits.device)]
        rows = [self._row(r, drafts[r]) for r, is_sound in zip(requests, sound, strict=True) if is_sound]
        tokens = iter(sample(logits, rows))
        return [next(tokens).token_id if is_sound else None for is_sound in sound]

    def _row(self, request: Request, drafts: Sequence[int]) -> SampleRequest:
        row = sample_request(request, drafts)
        if request.constraint is not None:
            row.allowed = request.constraint.masks(drafts)[-1]
        if request.params.wants_logprobs:  # those of drafts are nobody's
            plain = self._params.get(request)
            if plain is None:
                plain = self._params[request] = replace(request.params, logprobs=False)
            row.params = plain
        return row


def _most_drafts(request: Request) -> int:
    """Draft tokens that a request can use: the token after them is its last one, or comes before that."""
    left = min(request.params.max_tokens - len(request.output.token_ids), request.max_total_tokens - request.num_tokens)
    return left - 1
