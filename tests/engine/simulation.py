"""Steps of a scheduler over a real cache, without a model, with the invariants of every step asserted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from dsv4.cache import Cache
from dsv4.config import PAGE_TOKENS
from dsv4.engine.cache_manager import CacheManager
from dsv4.engine.config import EngineConfig
from dsv4.engine.outputs import SampledToken
from dsv4.engine.request import Request
from dsv4.engine.sampling_params import SamplingParams
from dsv4.engine.scheduler import Scheduler

from ..model.tiny import tiny_config

CONFIG = tiny_config(schedule=(128,), head_dim=16, qk_rope_head_dim=8)


@dataclass(frozen=True)
class Arrival:
    step: int
    prompt: int
    output: int
    user: str | None = None  # None: of a batch, which takes no turns


class PagedCache(Cache):
    """A cache that records the freed slots."""

    def __init__(self, rows: int, pages: int) -> None:
        super().__init__(CONFIG, rows, pages * PAGE_TOKENS, torch.device("cpu"), torch.float32, pages)
        self.resets: list[int] = []

    def reset(self, slot: int) -> None:
        super().reset(slot)
        self.resets.append(slot)


class Simulation:
    """Steps a scheduler without a model; asserts the invariants at every step."""

    def __init__(self, config: EngineConfig, arrivals: list[Arrival], pages: int = 1 << 12) -> None:
        self.config = config
        self.cache = PagedCache(config.max_num_seqs, pages)
        self.scheduler = Scheduler(config, CacheManager(self.cache, config.max_num_seqs, config))
        self.arrivals = sorted(arrivals, key=lambda arrival: arrival.step)
        self.first_token: dict[int, int] = {}  # index in `arrivals` -> steps from arrival to first token
        self.last_token: dict[int, int] = {}  # index in `arrivals` -> step of its last token
        self.longest_pause: Counter[int] = Counter()  # index in `arrivals` -> most steps between two of its tokens
        self._latest: dict[int, int] = {}
        self.requests = [self._request(i, arrival, pages) for i, arrival in enumerate(self.arrivals)]

    @staticmethod
    def _request(number: int, arrival: Arrival, pages: int) -> Request:
        params = SamplingParams(max_tokens=arrival.output, ignore_eos=True)
        user, turns = (arrival.user or "",), arrival.user is not None
        prompt = [5] * arrival.prompt
        return Request(number, prompt, params, 0, frozenset(), pages * PAGE_TOKENS, user=user, takes_turns=turns)

    def run(self, most_steps: int, until: int | None = None) -> Simulation:
        """Runs to the end, or to the first token of request `until`."""
        step = came = 0
        while (came < len(self.arrivals) or self.scheduler.has_work) and until not in self.first_token:
            while came < len(self.arrivals) and self.arrivals[came].step <= step:
                self.scheduler.add(self.requests[came])
                came += 1
            self._step(step)
            step += 1
            assert step <= most_steps, "somebody starves"
        if not self.scheduler.has_work:
            assert self.cache.pool.num_used == 0 and not any(self.cache.lengths), "something is left"
            assert not self.scheduler._queued and not self.scheduler._began and not self.scheduler._unfinished
            assert not self.scheduler.counters._active and not self.scheduler.counters._served
        return self

    def _step(self, step: int) -> None:
        decoding = {s for s in self.scheduler.running if s.num_uncomputed_tokens == 1}
        chunks = self.scheduler.schedule()
        unread = [s for s in self.scheduler.running if s.num_uncomputed_tokens > 1]
        decoding &= {*self.scheduler.running}  # some may have given way
        taken = {chunk.request: chunk.stop - chunk.start for chunk in chunks}
        total, most = sum(taken.values()), self.config.max_num_batched_tokens
        assert total <= most and all(count > 0 for count in taken.values()) and len(taken) == len(chunks)
        assert bool(chunks) == self.scheduler.has_work
        assert all(taken[request] == 1 for request in decoding), "whatever decodes gets its token"
        slots = [request.slot for request in self.scheduler.running]
        assert len(set(slots)) == len(slots) <= self.config.max_num_seqs and all(slot >= 0 for slot in slots)
        if unread:
            left = most - sum(request.num_uncomputed_tokens == 1 for request in taken)
            assert taken[unread[0]] >= min(unread[0].num_uncomputed_tokens, left - left // 2), "the first goes on"
            if taken[unread[0]] < unread[0].num_uncomputed_tokens:
                assert total == most, "no part of a step is left unused while there is something to read"
        self._compute(taken)
        half_read = sum(s.num_uncomputed_tokens > 1 for s in self.scheduler.running)
        assert half_read <= self.config.partial_prefills
        for chunk in chunks:
            if chunk.request.num_uncomputed_tokens == 0:
                self._append(chunk.request, step)

    def _compute(self, taken: dict[Request, int]) -> None:
        if not taken:
            return
        slots, starts, lengths = (
            np.array(values, dtype=np.int64)
            for values in zip(*((r.slot, r.num_computed_tokens, n) for r, n in taken.items()), strict=True)
        )
        self.cache.reserve(slots, starts, lengths)
        self.cache.advance(slots, lengths)
        for request, count in taken.items():
            request.num_computed_tokens += count

    def _append(self, request: Request, step: int) -> None:
        number = request.request_id
        request.append([SampledToken(7)], now=float(step))
        self.first_token.setdefault(number, step + 1 - self.arrivals[number].step)
        pause = step - self._latest.get(number, step)
        self.longest_pause[number] = max(self.longest_pause[number], pause)
        self._latest[number] = step
        if request.finished:
            self.last_token[number] = step
            slot, emptied = request.slot, len(self.cache.resets)
            self.scheduler.finish(request)
            assert self.cache.resets[emptied:] == [slot] and request.slot == -1
