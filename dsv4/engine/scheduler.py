"""Continuous batching: which requests compute how many tokens in the next step.

A request has no prefill phase and no decode phase: it has tokens that the cache does not hold yet. One that has many
is computed in chunks, one that has a single new token decodes, and a step mixes both.

How a step is shared: every request that decodes gets its token, and its drafts, up to half of what is left. Half of the
rest is the oldest unread prompt's, so that no stream of others can starve it. The other half goes to prompts of at most
half as many tokens as that one still has, the shortest first: so much shorter, a prompt gains more time by overtaking
than it costs the oldest. What is then left goes by age. Only `max_num_partial_prefills` cache rows hold half-read
prompts, so that a short prompt finds a row and its first token comes within a few steps, whatever is being read.

What stored prefixes hold of a prompt counts as read, and a chunk ends where the cache manager stores the state. When
pages run out that nobody else needs, the youngest running request gives way: it waits again, before all others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dsv4.engine.cache_manager import CacheManager
from dsv4.engine.config import EngineConfig
from dsv4.engine.request import Request, RequestStatus
from dsv4.engine.step import ScheduledChunk


def reading_order(unread: Sequence[int], budget: int) -> Iterator[tuple[int, int]]:
    """Order in which a step reads prompts: pairs (place, most tokens), served in turn until the budget is spent.

    `unread`: tokens that each prompt still has, the oldest prompt first.
    """
    yield 0, budget - budget // 2
    overtaking = [place for place, count in enumerate(unread) if place and 2 * count <= unread[0]]
    for place in sorted(overtaking, key=lambda place: unread[place]):  # stable: age decides among equals
        yield place, unread[place]
    yield from enumerate(unread)


class UnreadPart(NamedTuple):
    """Of a prompt: tokens that are still to be read, and those of its next chunk at most."""

    unread: int
    chunk: int


class Scheduler:
    """Shares out steps as the module says. The cache manager says which requests fit beside those that run."""

    def __init__(self, config: EngineConfig, cache_manager: CacheManager) -> None:
        self.config = config
        self.cache_manager = cache_manager
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._unfinished: dict[Request, None] = {}  # waiting and running, in the order of their coming

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        request.status = RequestStatus.WAITING
        self.waiting.append(request)
        self._unfinished[request] = None

    def schedule(self) -> list[ScheduledChunk]:
        """The next step's chunks: the requests that decode, then prompts, some of which begin to run."""
        counts = {request: 1 for request in self.running if request.num_uncomputed_tokens == 1}
        left = self.config.max_num_batched_tokens - len(counts)
        drafts = self._drafts(list(counts), left)
        left -= sum(map(len, drafts.values()))
        counts |= self._read(left)
        if drafts and not self._has_room(counts, drafts):
            drafts = {}  # nobody gives way to a guess
        while not self._has_room(counts, drafts):
            youngest = next(r for r in reversed(self._unfinished) if r.status is RequestStatus.RUNNING)
            counts.pop(youngest, None)
            self._preempt(youngest)
        chunks: list[ScheduledChunk] = []
        for request, count in counts.items():
            start = request.num_computed_tokens
            chunks.append(ScheduledChunk(request, start, start + count, drafts.get(request, ())))
        return chunks

    def _drafts(self, decoding: list[Request], budget: int) -> dict[Request, tuple[int, ...]]:
        """Drafts of the requests that decode: in all at most half of the budget, so that prompts are read on."""
        drafts = {request: request.draft_token_ids for request in decoding if request.draft_token_ids}
        excess = sum(map(len, drafts.values())) - budget // 2
        while excess > 0:
            longest = max(drafts, key=lambda request: len(drafts[request]))
            drafts[longest] = drafts[longest][:-1]
            excess -= 1
        return {request: tokens for request, tokens in drafts.items() if tokens}

    def _has_room(self, counts: dict[Request, int], drafts: dict[Request, tuple[int, ...]]) -> bool:
        """Makes room for as many tokens and drafts; False: it takes that someone gives way."""
        if not drafts:
            return self.cache_manager.make_room(counts)
        return self.cache_manager.make_room({r: count + len(drafts.get(r, ())) for r, count in counts.items()})

    def _read(self, budget: int) -> dict[Request, int]:
        """Tokens to read of each prompt, `budget` in all. Prompts that begin have a row afterwards."""
        waiting = RequestStatus.WAITING
        prompts = [r for r in self._unfinished if r.status is waiting or r.num_uncomputed_tokens > 1]
        if not prompts or not budget:
            return {}
        parts = {request: self._unread_part(request) for request in prompts}
        counts: dict[Request, int] = {}
        for place, most in reading_order([part.unread for part in parts.values()], budget):
            request = prompts[place]
            count = min(most, budget, parts[request].chunk - counts.get(request, 0))
            if count <= 0:
                continue
            if request.status is waiting:
                if not self._may_begin(request, parts[request].unread - count, prompts[0], counts):
                    continue
                self._begin(request)
            counts[request] = counts.get(request, 0) + count
            budget -= count
        return counts

    def _unread_part(self, request: Request) -> UnreadPart:
        """Of a prompt that is being read, or of one that waits and begins at a stored prefix."""
        start, common = request.num_computed_tokens, request.common_tokens
        if request.status is RequestStatus.WAITING and request.saved is None:
            match = self.cache_manager.match(request)
            start, common = match.length, match.common
        chunk = self.cache_manager.next_place(request, start, common) - start
        if request.max_chunk_tokens is not None:
            chunk = min(chunk, request.max_chunk_tokens)
        return UnreadPart(request.num_tokens - start, chunk)

    def _may_begin(self, request: Request, left: int, oldest: Request, counts: dict[Request, int]) -> bool:
        """True if a waiting request may begin with a chunk after which `left` tokens are unread. One that has its first
        token with it, or with the next, needs no more."""
        if self.waiting[0].saved is not None and request.saved is None:
            return False  # whoever gave way goes on first
        if not self.cache_manager.can_allocate(request):
            return False
        if request is oldest or left <= 1 or request.saved is not None:
            return True
        half_read = [r for r in {oldest, *self.running} if r.num_uncomputed_tokens - counts.get(r, 0) > 1]
        return len(half_read) < self.config.partial_prefills

    def _begin(self, request: Request) -> None:
        self.waiting.remove(request)
        self.cache_manager.allocate(request)
        request.status = RequestStatus.RUNNING
        self.running.append(request)

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self.cache_manager.preempt(request)
        request.status = RequestStatus.WAITING
        self.waiting.appendleft(request)

    def finish(self, request: Request) -> None:
        """Takes a request out; what it holds of the cache is free again."""
        if request.status is RequestStatus.WAITING:
            self.waiting.remove(request)
        elif request.status is RequestStatus.RUNNING:
            self.running.remove(request)
        self._unfinished.pop(request, None)
        request.status = RequestStatus.FINISHED
        self.cache_manager.release(request)
