"""DiskPrefixes: stored prefixes on disk as the cache manager sees them, under the window policy."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from dsv4.cache import PrefixEntry
from dsv4.cache.disk import DiskCache, DiskLookup, DiskMatch, Reader, Reading
from dsv4.cache.prefix import TokensOf
from dsv4.config import PAGE_TOKENS
from dsv4.engine.config import WindowPolicy


class DiskPrefixes:
    """Stored prefixes on disk, of which the policy keeps states. Requests wait for theirs while others are computed.

    `most_readings`: prefixes that are read, or have been and wait to be used, at a time: they take memory.
    """

    def __init__(self, disk: DiskCache, policy: WindowPolicy, most_readings: int) -> None:
        self.disk, self.policy, self.most_readings = disk, policy, most_readings
        self._reader = Reader(disk)
        self._readings: dict[DiskLookup, Reading] = {}

    def wait(self, seconds: float) -> bool:
        """Wait until a prefix has been read, `seconds` at most. False: no request waits for any."""
        if not self._readings:
            return False
        self._reader.wait(seconds)
        return True

    def lookup(self, tokens: TokensOf, salt: str | None) -> DiskLookup:
        """For a new request, whose tokens only grow."""
        return DiskLookup(self.disk.keys(tokens, salt))

    def find(self, lookup: DiskLookup, count: int, in_memory: int) -> DiskMatch | None:
        """Prefix of the first `count` tokens on disk that is longer by a block than theirs in memory."""
        if in_memory + PAGE_TOKENS > count:
            return None
        if not lookup.done:
            self.disk.stats.external_prefix_cache_queries += count
            lookup.found, lookup.done = self.disk.find(lookup.keys, count), True
        return lookup.found if lookup.found and lookup.found.length >= in_memory + PAGE_TOKENS else None

    def is_ready(self, lookup: DiskLookup, match: DiskMatch, num_known: Callable[[], int]) -> bool:
        """False while a match is being read, which the first call begins; True, too, where it will not come.

        `num_known`: blocks that memory has and that are not read.
        """
        reading = self._readings.get(lookup)
        if reading is None:
            if len(self._readings) < self.most_readings:
                self._readings[lookup] = self._reader.start(match, num_known())
            return False
        if not reading.done:
            if time.monotonic() > reading.deadline:
                self.drop(lookup)
                lookup.found = None  # a miss
                return True
            return False
        if reading.loaded is None:
            self.drop(lookup)
            shorter = self.disk.find(lookup.keys, match.length)  # without files that were found damaged or gone
            lookup.found = shorter if shorter is not None and shorter.length < match.length else None
            return lookup.found is None
        if num_known() < reading.first:  # memory has lost some
            self._readings[lookup] = self._reader.start(match, 0)
            return False
        return True

    def take(self, lookup: DiskLookup) -> Reading | None:
        """Prefix that has been read; None: nothing."""
        reading = self._readings.pop(lookup, None)
        return reading if reading is not None and reading.loaded is not None else None

    def drop(self, lookup: DiskLookup) -> None:
        """Drop the reading for a request that needs it no more."""
        reading = self._readings.pop(lookup, None)
        if reading is not None:
            reading.cancelled = True

    def begin(self, lookup: DiskLookup, tokens: int) -> None:
        """A request begins, with `tokens` of its tokens from the disk. If it gives way, it is looked up again."""
        stats = self.disk.stats
        if lookup.done:
            stats.num_hits += tokens > 0
            stats.num_misses += tokens == 0
            stats.external_prefix_cache_hits += tokens
            lookup.found, lookup.done = None, False

    def distrust(self, lookups: Iterable[tuple[DiskLookup, int]]) -> None:
        """Forget what is stored of the requests' first tokens."""
        self.disk.distrust((lookup.keys, count) for lookup, count in lookups)

    def store(self, lookup: DiskLookup, length: int, pages: Sequence[int], entry: PrefixEntry) -> None:
        """Keep the blocks of the first `length` tokens, which lie in `pages`, and their state if the policy says so."""
        snapshot = entry.snapshot if self.policy.keeps_state(length) else None
        self.disk.store(lookup.keys, length, pages, snapshot)
