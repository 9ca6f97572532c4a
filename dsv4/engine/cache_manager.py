"""CacheManager: owns the model's cache: rows and pages of requests, and what is kept of them for later ones.

A request is admitted when the pages that it needs soon, beside those that running requests need soon, are free or hold
nothing but stored prefixes. It begins at the longest stored prefix of its tokens. Its state is stored where a chunk
ends at one of its places: one token before the end of the prompt (the same prompt again then computes one token), at
that end, where the prompt leaves a path that another took or one that waits for it will leave it, every
`snapshot_interval` tokens, and where it ends itself.
With a disk cache, prefixes that memory lacks are loaded from there, and what memory stores goes there too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from dsv4.cache import NO_MATCH, Cache, PrefixCache, PrefixMatch
from dsv4.cache.disk import DiskLookup, DiskMatch
from dsv4.cache.pages import pages_for
from dsv4.config import PAGE_TOKENS
from dsv4.engine.choices import ChoiceRecorder
from dsv4.engine.config import EngineConfig
from dsv4.engine.disk_prefixes import DiskPrefixes
from dsv4.engine.metrics import Metric, counter, gauge, labelled
from dsv4.engine.model import EngineCache, TruncatableCache
from dsv4.engine.request import Request


class StoredPrefix(NamedTuple):
    """Start of a waiting request: a prefix in memory, or one on disk that is longer."""

    memory: PrefixMatch
    disk: DiskMatch | None
    common: int  # tokens in whole stored blocks

    @property
    def length(self) -> int:
        """Tokens that need no computation."""
        return self.memory.length if self.disk is None else self.disk.length

    @property
    def page_tokens(self) -> int:
        """Tokens whose pages it begins with; a replay reads entries past its beginning."""
        return self.memory.length if self.disk is None else max(self.disk.length, self.disk.num_blocks * PAGE_TOKENS)


NO_PREFIX = StoredPrefix(NO_MATCH, None, 0)


class CacheManager:
    """Gives each running request a cache row (`request.slot`) of its own.

    A cache that is not a `dsv4.cache.Cache` has rows alone: no pages to run out of, no prefixes.
    """

    def __init__(
        self,
        cache: EngineCache,
        num_slots: int,
        config: EngineConfig | None = None,
        disk: DiskPrefixes | None = None,
    ) -> None:
        config = config or EngineConfig()
        self.cache = cache
        self.num_preemptions = 0
        self.prefixes: PrefixCache | None = None
        self._pages = cache if isinstance(cache, Cache) else None
        if self._pages is not None and config.enable_prefix_caching:
            self.prefixes = PrefixCache(self._pages, config.prefix_cache_bytes)
        self.disk = disk if self.prefixes is not None else None
        self._interval = config.snapshot_interval
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._running: dict[int, Request] = {}  # by slot
        self._matches: dict[Request, tuple[int, PrefixMatch]] = {}  # of waiting requests, with the prefixes' version
        self.before_snapshot: Callable[[Request], None] | None = None  # lets the MTP block read what the row holds
        self.may_store: Callable[[], bool] = lambda: True  # asked before a prefix goes to the disk
        self.recorder: ChoiceRecorder | None = None  # of what was chosen for the tokens that stored prefixes hold
        self._saved: dict[Request, int] = {}  # bytes that are kept of requests that gave way
        self._unsound: set[int] = set()  # rows that a failed step may have left half-written

    @property
    def num_free_slots(self) -> int:
        """Rows that no request has."""
        return len(self._free_slots)

    @property
    def can_preempt(self) -> bool:
        """True if what a row holds can be copied and put back."""
        return self._pages is not None

    # Admission

    def match(self, request: Request) -> StoredPrefix:
        """The stored prefix that a waiting request would begin at; the logits of its last token are to be computed, or,
        for the log-probabilities of its prompt, those of all tokens."""
        unused = request.saved is not None or request.params.prompt_logprobs
        if self.prefixes is None or unused:
            return NO_PREFIX
        # Every step asks this of every request that waits: the same prefixes are not searched twice.
        version, match = self._matches.get(request, (-1, NO_MATCH))
        if version != self.prefixes.version:
            match = self.prefixes.find(request.tokens, request.num_tokens - 1, request.params.cache_salt)
            self._matches[request] = self.prefixes.version, match
        if self.disk is None:
            return StoredPrefix(match, None, match.common)
        lookup = self._lookup(self.disk, request)
        found = self.disk.find(lookup, request.num_tokens - 1, match.length)
        return StoredPrefix(match, found, max(match.common, lookup.common))

    def is_ready(self, request: Request) -> bool:
        """False while the prefix that a waiting request would begin at is being read from the disk."""
        if self.disk is None or request.saved is not None:
            return True
        match = self.match(request).disk
        lookup = self._lookup(self.disk, request)
        if match is None:
            self.disk.drop(lookup)
            return True
        return self.disk.is_ready(lookup, match, lambda: len(self._known_blocks(request, match)))

    def wait_for_disk(self, seconds: float) -> bool:
        """Waits until a prefix has been read from the disk, `seconds` at most. False: none is being read."""
        return self.disk is not None and self.disk.wait(seconds)

    def can_allocate(self, request: Request) -> bool:
        """True if a request that waits is ready and fits beside those that run. Alone every request fits that was
        taken."""
        if not self.is_ready(request):
            return False
        if not self._free_slots or self._pages is None or not self._running:
            return bool(self._free_slots)
        needed = _pages_soon(request)
        for slot, other in self._running.items():
            needed += max(0, _pages_soon(other) - len(self._pages.pages_of(slot)))
        if needed <= self._pages.num_free_pages:
            return True
        held = self._pages.pages_in_rows()
        shared = held.intersection(self._known_pages(request))
        return needed - len(shared) <= self._pages.max_pages - len(held)

    def allocate(self, request: Request) -> None:
        """Gives a request its row, with what is known of its tokens; `can_allocate` holds."""
        match = self.match(request)
        self._matches.pop(request, None)
        request.slot = self._free_slots.pop()
        self._running[request.slot] = request
        if request.saved is not None:
            self._resume(request)
            return
        request.common_tokens = match.common
        if match.disk is not None and self._load(request, match.disk):
            request.num_computed_tokens = match.length
        else:
            if match.disk is not None:  # it was gone; for its sake memory may have changed
                match = self._find_in_memory(request)
            request.num_computed_tokens = match.memory.length
            if match.memory.entry is not None:
                assert self.prefixes is not None
                self.prefixes.take(request.slot, match.memory.entry)
                request.prefix = match.memory.entry
                if self.recorder is not None:
                    self.recorder.begin(request.choices, match.memory.entry)
        if request.scheduled_time is None:  # not one that gave way before it computed anything
            request.output.cached_tokens = request.num_computed_tokens
        if self.disk is not None:
            self.disk.drop(self._lookup(self.disk, request))
            self.disk.begin(self._lookup(self.disk, request), 0 if match.disk is None else match.length)

    def make_room(self, counts: Mapping[Request, int]) -> bool:
        """Makes the pages free that a step needs for as many more tokens; False: stored prefixes are too few."""
        if self.has_room(counts):
            return True
        return self.prefixes is not None and self.prefixes.evict_until(lambda: self.has_room(counts))

    def has_room(self, counts: Mapping[Request, int]) -> bool:
        """True if the pages are free that a step needs for as many more tokens."""
        pages = self._pages
        if pages is None or pages.num_free_pages >= sum(counts.values()) // PAGE_TOKENS + 2 * len(counts):
            return True  # a row needs at most that many and a copy of its begun page
        return pages.pages_needed((request.slot for request in counts), counts.values()) <= pages.num_free_pages

    # The end of a row

    def preempt(self, request: Request) -> None:
        """Takes a request's row away. What it held is copied, so that it goes on later without computing it again."""
        assert self._pages is not None, "a cache without pages never runs out of them"
        self.num_preemptions += 1
        if request.num_computed_tokens and self._is_sound(request):
            if self.before_snapshot is not None:
                self.before_snapshot(request)
            request.saved = self._pages.save(request.slot)
            self._saved[request] = request.saved.num_bytes
        else:
            request.num_computed_tokens = 0
        self._free_row(request)

    def truncate(self, request: Request) -> None:
        """Takes back what the row holds beyond the request's computed tokens, such as rejected drafts."""
        if request.finished and not isinstance(self.cache, TruncatableCache):
            return  # its row is emptied next
        assert isinstance(self.cache, TruncatableCache), "drafts are scheduled only for a cache that can take them back"
        self.cache.truncate(request.slot, request.num_computed_tokens)

    def release(self, request: Request) -> None:
        """Empties the row of a request that has ended, if it has one. What it has answered is stored."""
        request.saved = None
        self._saved.pop(request, None)
        self._matches.pop(request, None)
        if request.slot >= 0:
            if request.num_computed_tokens >= len(request.prompt_token_ids):
                self._store(request)
            self._free_row(request)
        if request.on_disk is not None and self.disk is not None:
            self.disk.drop(request.on_disk)
        request.on_disk = None

    # Numbers

    def metrics(self) -> Iterator[Metric]:
        yield counter("vllm:num_preemptions", "Times that a running request gave way.", self.num_preemptions)
        pages, prefixes = self._pages, self.prefixes
        if pages is None:
            return
        used = pages.pool.num_used
        yield gauge("vllm:kv_cache_usage_perc", "Share of the cache's pages in use, 1: all.", used / pages.max_pages)
        sizes = pages.live_bytes(len(self._running))
        sizes["snapshots"] = 0 if prefixes is None else prefixes.snapshot_bytes
        sizes["preempted"] = sum(list(self._saved.values()))
        name, text = "dsv4:cache_bytes", "Bytes of the cache in use, by component."
        yield labelled("gauge", name, text, "component", ((key, float(size)) for key, size in sizes.items()))
        stored = 0 if prefixes is None else prefixes.num_pages * pages.page_bytes
        yield gauge("dsv4:prefix_cache_page_bytes", "Bytes of pages that stored prefixes hold.", stored)

    # What is kept

    def next_place(self, request: Request, computed: int, common: int) -> int:
        """Latest end of a chunk that begins after `computed` tokens: the next place to be stored, or the request's last
        token."""
        end = request.num_tokens
        if self.prefixes is None:
            return end
        prompt = len(request.prompt_token_ids)
        places = [
            common,
            request.shared_tokens,
            prompt - 1,
            prompt,
            computed - computed % self._interval + self._interval,
        ]
        if self.disk is not None and (place := self.disk.policy.next_place(computed)) is not None:
            places.append(place)
        return min(end, *(place for place in places if place > computed))

    def store_places(self, requests: Iterable[Request]) -> None:
        """After a step: keep the states of those of its requests that are computed up to a place."""
        if self.prefixes is None:
            return
        for request in requests:
            computed, prompt = request.num_computed_tokens, len(request.prompt_token_ids)
            places = (prompt - 1, prompt, request.common_tokens, request.shared_tokens)
            at_place = computed in places or computed % self._interval == 0
            if at_place or (self.disk is not None and self.disk.policy.is_place(computed)):
                self._store(request)

    def distrust(self, earlier: bool) -> None:
        """After a step that failed: forget all prefixes in memory, and store nothing of the rows that run.

        `earlier`: steps before it may have computed nonsense: forget what they have stored on disk of these rows, too.
        """
        if earlier and self.disk is not None:
            self.disk.distrust(
                (self._lookup(self.disk, request), request.num_computed_tokens) for request in self._running.values()
            )
        self._unsound.update(self._running)
        self.reset_prefixes()

    def reset_prefixes(self) -> None:
        """Forgets all prefixes."""
        if self.prefixes is not None:
            self.prefixes.clear()

    def _store(self, request: Request) -> None:
        if self.prefixes is None or self._pages is None or not self._is_sound(request):
            return
        if self.before_snapshot is not None:
            self.before_snapshot(request)
        entry = self.prefixes.store(request.slot, request.tokens, request.params.cache_salt)
        if self.recorder is not None:
            self.recorder.store(request.choices, entry)
        if self.disk is not None and self.may_store():
            pages = self._pages.pages_of(request.slot)
            self.disk.store(self._lookup(self.disk, request), request.num_computed_tokens, pages, entry)

    def _lookup(self, disk: DiskPrefixes, request: Request) -> DiskLookup:
        if request.on_disk is None:
            request.on_disk = disk.lookup(request.tokens, request.params.cache_salt)
        return request.on_disk

    def _is_sound(self, request: Request) -> bool:
        """True if the row holds the request's computed tokens and nothing else, such as drafts, and all their state."""
        slot = request.slot
        if slot in self._unsound or (self._pages is not None and self._pages.is_replaying(slot)):
            return False
        return self.cache.lengths[slot] == request.num_computed_tokens

    def _known_blocks(self, request: Request, match: DiskMatch) -> list[int]:
        """Pages of the blocks of a match that memory has."""
        assert self.prefixes is not None
        return self.prefixes.block_pages(request.tokens, match.num_blocks * PAGE_TOKENS, request.params.cache_salt)

    def _load(self, request: Request, match: DiskMatch) -> bool:
        """Puts a prefix that was read from the disk into a request's row, but for blocks that memory has. False, with
        the row empty: it was gone, damaged or of another form."""
        pages, prefixes = self._pages, self.prefixes
        assert pages is not None and prefixes is not None and self.disk is not None
        reading = self.disk.take(self._lookup(self.disk, request))
        known = self._known_blocks(request, match)
        if reading is None or reading.loaded is None:
            return False
        loaded = reading.loaded
        assert reading.match is match and reading.first <= len(known), "allocate follows can_allocate"
        pages.attach(request.slot, known)
        missing = max(pages_for(match.length), match.num_blocks) - len(known)
        prefixes.evict_until(lambda: missing <= pages.num_free_pages)
        try:
            pages.load_pages(request.slot, missing, loaded.entries_after(len(known) - reading.first))
            if loaded.snapshot is None:
                pages.replay(request.slot, match.length, match.common)
            else:
                pages.restore(request.slot, loaded.snapshot)
        except ValueError:  # too few pages after all, or a state of another form
            pages.reset(request.slot)
            return False
        if loaded.snapshot is not None:
            prefixes.store(request.slot, request.tokens, request.params.cache_salt)
        return True

    def _find_in_memory(self, request: Request) -> StoredPrefix:
        assert self.prefixes is not None
        match = self.prefixes.find(request.tokens, request.num_tokens - 1, request.params.cache_salt)
        return StoredPrefix(match, None, match.common)

    def _resume(self, request: Request) -> None:
        """Puts back what a request held that had to give way; whole blocks that are stored need no copy."""
        saved, pages = request.saved, self._pages
        assert saved is not None and pages is not None
        length = saved.snapshot.length
        pages.attach(request.slot, self._known_pages(request))
        missing = pages_for(length) - len(self._known_pages(request))
        if self.prefixes is not None:
            self.prefixes.evict_until(lambda: missing <= pages.num_free_pages)
        pages.load(request.slot, saved)
        request.saved, request.num_computed_tokens = None, length
        del self._saved[request]

    def _known_pages(self, request: Request) -> list[int]:
        """Pages of whole blocks of a waiting request that are stored and that it would use."""
        if self.prefixes is None:
            return []
        match, salt = self.match(request), request.params.cache_salt
        length = match.page_tokens if request.saved is None else request.saved.snapshot.length
        return self.prefixes.block_pages(request.tokens, length, salt)

    def _free_row(self, request: Request) -> None:
        slot, request.slot = request.slot, -1
        del self._running[slot]
        self._unsound.discard(slot)
        self._free_slots.append(slot)
        self.cache.reset(slot)
        if request.prefix is not None:
            assert self.prefixes is not None
            self.prefixes.let_go(request.prefix)
            request.prefix = None


def _pages_soon(request: Request) -> int:
    """Pages that hold a request's tokens and the next page's worth, where it can have as many."""
    most = min(request.max_total_tokens, len(request.prompt_token_ids) + request.params.max_tokens)
    return pages_for(min(request.num_tokens + PAGE_TOKENS, most))
