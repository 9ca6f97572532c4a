"""Continuous batching: which requests compute how many tokens in the next step.

A request has no prefill phase and no decode phase: it has tokens that the cache does not hold yet. One that has many
is computed in chunks, one that has a single new token decodes, and a step mixes both.

Tokens of a step: every request that decodes gets its token, and its drafts, up to half of what is left. Half of the
rest is that prompt's which is read first, so that no stream of others can starve it. The other half goes to prompts of
at most half as many tokens as that one still has, the shortest first: so much shorter, a prompt gains more time by
overtaking than it costs the first. Then come prompts of users that were served less than the first one's. What is left
goes by order.

Rows of the cache: those that wait are ordered by the tokens served to their users (fairness.py), those of one user by
time once they have waited for `time_slice` steps, before that the shortest prompt first. A row that is free goes to the
first of them that continues, or whose prompt is short or to be read next; others get what is left. Only
`max_num_partial_prefills` rows hold half-read prompts. Where no row or no page is free, a request that has run for
`time_slice` steps gives way, or one of a user who has several rows to a user who has none.

What stored prefixes hold of a prompt counts as read, and a chunk ends where the cache manager stores the state. A
prompt that begins like one that is being read waits for its state (prefix_sharing.py). When a step runs out of pages
that nobody else needs, the youngest running request gives way: it waits again, before all others. Whoever gives way
keeps its state, so that no token is computed twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from typing import NamedTuple

from dsv4.engine.cache_manager import CacheManager
from dsv4.engine.cache_size import most_paused
from dsv4.engine.config import EngineConfig
from dsv4.engine.fairness import ServiceCounters, User
from dsv4.engine.metrics import Metric, gauge
from dsv4.engine.prefix_sharing import PrefixSharing
from dsv4.engine.request import Request, RequestStatus
from dsv4.engine.step import ScheduledChunk


def reading_order(unread: Sequence[int], budget: int, owed: Iterable[int] = ()) -> Iterator[tuple[int, int]]:
    """Order in which a step reads prompts: pairs (place, most tokens), served in turn until the budget is spent.

    `unread`: tokens that each prompt still has, the one to be read first first. `owed`: places of prompts that share
    the step with it whatever their length.
    """
    yield 0, budget - budget // 2
    overtaking = [place for place, count in enumerate(unread) if place and 2 * count <= unread[0]]
    for place in sorted(overtaking, key=lambda place: unread[place]):  # stable: order decides among equals
        yield place, unread[place]
    for place in owed:
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
        self.counters = ServiceCounters()
        self.sharing = PrefixSharing(cache_manager.prefixes, lambda request: cache_manager.match(request).length)
        self.waiting: list[Request] = []  # after a step in the order in which they are to go on
        self.running: list[Request] = []  # in the order of their beginning
        self._unfinished: dict[Request, None] = {}  # waiting and running, in the order of their coming
        self._numbers = count()
        self._queued: dict[Request, tuple[int, int, int]] = {}  # of those that wait: rank, number among it, step
        self._paused: Counter[User] = Counter()  # requests that wait to continue, by user
        self._began: dict[Request, int] = {}  # of those that run: the step that gave it its row
        self._step = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def metrics(self) -> Iterator[Metric]:
        yield gauge("vllm:num_requests_running", "Requests that have a row of the cache.", len(self.running))
        yield gauge("vllm:num_requests_waiting", "Requests that wait, to begin or to continue.", len(self.waiting))

    def add(self, request: Request) -> None:
        self._wait(request, 1)
        self._unfinished[request] = None
        self.counters.enter(request.user)

    def schedule(self) -> list[ScheduledChunk]:
        """The next step's chunks: the requests that decode, then prompts, some of which begin to run."""
        self._step += 1
        admitted = self._give_rows() if self.waiting else []
        counts = {request: 1 for request in self.running if request.num_uncomputed_tokens == 1}
        left = self.config.max_num_batched_tokens - len(counts)
        drafts = self._drafts(list(counts), left)
        left -= sum(map(len, drafts.values()))
        counts |= self._read(admitted, left)
        while not self.cache_manager.make_room(counts):
            youngest = next(r for r in reversed(self._unfinished) if r.status is RequestStatus.RUNNING)
            counts.pop(youngest, None)
            self._preempt(youngest)
        if drafts and not self.cache_manager.has_room({r: n + len(drafts.get(r, ())) for r, n in counts.items()}):
            drafts = {}  # nothing gives way to a guess
        chunks: list[ScheduledChunk] = []
        for request, tokens in counts.items():
            start = request.num_computed_tokens
            chunk = ScheduledChunk(request, start, start + tokens, drafts.get(request, ()))
            chunks.append(chunk)
            self.counters.serve(request.user, chunk.num_tokens)
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

    # Rows

    def _give_rows(self) -> list[Request]:
        """Lets requests continue that gave way, and returns those that may begin in this step, at most one per free
        row. Some that run give way."""
        if not self.cache_manager.num_free_slots and not self._somebody_may_give_way():
            return []
        reading = [request for request in self.running if request.num_uncomputed_tokens > 1]
        admitted: list[Request] = []
        later: list[Request] = []
        refused: set[tuple[User, bool]] = set()  # what holds for one of these holds for all
        num_long = 0  # of those that are let in and are read in parts
        first = self._unread_part(reading[0]).unread if reading else 0
        for request in self._sort_waiting(any_reading=bool(reading)):
            continues = request.saved is not None
            if (request.user, continues) in refused:
                continue
            if not continues:
                self.sharing.plan(request, (*reading, *admitted))
                if self.sharing.awaits(request, reading):
                    continue
            unread = request.num_uncomputed_tokens if continues else self._unread_part(request).unread
            if unread <= (1 if continues else self._short):
                wants = True
            else:
                may = len(reading) + num_long < self.config.partial_prefills
                wants = not first or (may and (continues or 2 * unread <= first))
            if not wants:
                later.append(request)
                continue
            if not self.cache_manager.is_ready(request):
                continue  # nobody gives way to it, and it holds nobody up
            if not self._make_way(request, len(admitted)):
                if self.cache_manager.num_free_slots > len(admitted):
                    return admitted  # it waits for pages: nobody may take them before it
                refused.add((request.user, continues))
                continue
            if continues:
                self._begin(request)
            else:
                admitted.append(request)
            if unread > (1 if continues else self._short):
                num_long += 1
            if not (continues and unread == 1):
                first = first or unread
        later.sort(key=lambda request: self._queued[request])
        return admitted + later[: self.cache_manager.num_free_slots - len(admitted)]

    @property
    def _short(self) -> int:
        """Most tokens of a prompt that counts as short: it fits into the half of a step that the first one leaves."""
        return self.config.max_num_batched_tokens // 2

    def _sort_waiting(self, any_reading: bool) -> list[Request]:
        """Sorts those that wait: those that pages ran out for, then by service; of a user those that have waited for a
        time slice, by time, then the shortest prompts, then those that continue. Returns a copy.

        A user who has too many that are to continue begins no others. Where no prompt is being read, the one that came
        first is before those of its user that have not waited long.
        """
        self._paused = Counter(request.user for request in self.waiting if request.saved is not None)
        service = {user: self.counters.served(user) for user in {request.user for request in self.waiting}}
        places: dict[Request, tuple[int, tuple[int, ...], bool]] = {}
        for request in self.waiting:
            rank = self._queued[request][0]
            full = request.saved is None and self._has_begun_enough(request.user)
            places[request] = (rank, service[request.user], full) if rank else (rank, (), False)
        first = None if any_reading else min(self.waiting, key=lambda r: (*places[r], self._queued[r]))

        def key(request: Request) -> tuple[object, ...]:
            _, number, since = self._queued[request]
            if request is first or (request.takes_turns and self._step - since >= self.config.time_slice):
                return *places[request], 0, number
            if request.saved is not None:
                return *places[request], 2, number
            return *places[request], 1, self._unread_part(request).unread, number

        self.waiting.sort(key=key)
        return list(self.waiting)

    def _make_way(self, request: Request, reserved: int) -> bool:
        """True if a request fits into the cache beside `reserved` free rows, after others have given way if need be."""
        manager = self.cache_manager
        while manager.num_free_slots <= reserved or not manager.can_allocate(request):
            other = self._to_give_way(request)
            if other is None:
                return False
            self._preempt(other, rank=1)
        return True

    def _to_give_way(self, request: Request) -> Request | None:
        """The running request that gives way to one that waits: of those who may, of the user served most, the one that
        has run longest. None: nobody."""
        if not request.takes_turns or not self.cache_manager.can_preempt:
            return None
        rows = Counter(other.user for other in self.running)
        served = self.counters.served(request.user)
        full = request.saved is None and self._has_begun_enough(request.user)
        found: list[tuple[tuple[int, ...], int, Request]] = []
        for other in self.running:
            if other.user == request.user:
                may = self._turn_is_over(other) and not full
            else:
                unequal = rows[other.user] > 1 and not rows[request.user]
                may = (unequal or self._turn_is_over(other)) and self.counters.served(other.user) > served
            if may and other.takes_turns:
                found.append((self.counters.served(other.user), -self._began[other], other))
        return max(found, key=lambda item: item[:2])[2] if found else None

    def _somebody_may_give_way(self) -> bool:
        if not self.cache_manager.can_preempt:
            return False
        rows = Counter(request.user for request in self.running if request.takes_turns)
        if any(request.takes_turns and self._turn_is_over(request) for request in self.running):
            return True
        return max(rows.values(), default=0) > 1 and any(not rows[request.user] for request in self.waiting)

    def _has_begun_enough(self, user: User) -> bool:
        """True for a user who begins no request before others have continued: what waits to continue takes memory."""
        return self._paused[user] >= most_paused(self.config.max_num_seqs)

    def _turn_is_over(self, request: Request) -> bool:
        return self._step - self._began[request] >= self.config.time_slice

    # Tokens

    def _read(self, admitted: list[Request], budget: int) -> dict[Request, int]:
        """Tokens to read of each prompt, `budget` in all. Prompts that begin have a row afterwards."""
        prompts = [r for r in self.running if r.num_uncomputed_tokens > 1] + admitted
        if not prompts or not budget:
            return {}
        parts = {request: self._unread_part(request) for request in prompts}
        counts: dict[Request, int] = {}
        unread = [part.unread for part in parts.values()]
        for place, most in reading_order(unread, budget, self._owed(prompts)):
            request = prompts[place]
            tokens = min(most, budget, parts[request].chunk - counts.get(request, 0))
            if tokens <= 0:
                continue
            if request.status is RequestStatus.WAITING:
                reading = (other for other in self.running if other.num_uncomputed_tokens > 1)
                if self.sharing.awaits(request, reading):  # one that has begun just now
                    continue
                if not self._may_begin(request, parts[request].unread - tokens, prompts[0], counts):
                    continue
                self._begin(request)
            counts[request] = counts.get(request, 0) + tokens
            budget -= tokens
        return counts

    def _owed(self, prompts: list[Request]) -> list[int]:
        """Place of the first prompt of each user who was served less than the first prompt's user."""
        served = self.counters.served(prompts[0].user)
        places: dict[User, int] = {}
        for place, request in enumerate(prompts):
            if request.user not in places and self.counters.served(request.user) < served:
                places[request.user] = place
        return list(places.values())

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

    def _may_begin(self, request: Request, left: int, first: Request, counts: dict[Request, int]) -> bool:
        """True if a request may begin with a chunk after which `left` tokens are unread. One that has its first token
        with it, or with the next, needs no more."""
        if not self.cache_manager.can_allocate(request):
            return False
        if request is first or left <= 1:
            return True
        half_read = [r for r in {first, *self.running} if r.num_uncomputed_tokens - counts.get(r, 0) > 1]
        return len(half_read) < self.config.partial_prefills

    # The life of a request

    def _wait(self, request: Request, rank: int) -> None:
        """Queues a request behind those of its rank: 0 for one that pages ran out for, else 1."""
        request.status = RequestStatus.WAITING
        self.waiting.append(request)
        self._queued[request] = rank, request.request_id if rank == 0 else next(self._numbers), self._step

    def _begin(self, request: Request) -> None:
        self.waiting.remove(request)
        del self._queued[request]
        self.sharing.forget(request)
        self.cache_manager.allocate(request)
        request.status = RequestStatus.RUNNING
        self.running.append(request)
        self._began[request] = self._step

    def _preempt(self, request: Request, rank: int = 0) -> None:
        self.running.remove(request)
        del self._began[request]
        self.cache_manager.preempt(request)
        self._wait(request, rank)
        self._paused[request.user] += 1

    def finish(self, request: Request) -> None:
        """Takes a request out; what it holds of the cache is free again."""
        if request.status is RequestStatus.WAITING:
            self.waiting.remove(request)
            del self._queued[request]
        elif request.status is RequestStatus.RUNNING:
            self.running.remove(request)
            del self._began[request]
        if request in self._unfinished:
            del self._unfinished[request]
            self.counters.leave(request.user)
        self.sharing.forget(request)
        request.status = RequestStatus.FINISHED
        self.cache_manager.release(request)
