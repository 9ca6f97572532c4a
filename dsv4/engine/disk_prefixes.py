"""DiskPrefixes: stored prefixes on disk as the cache manager sees them, under the window policy."""

from __future__ import annotations

from collections.abc import Sequence

from dsv4.cache import PrefixEntry
from dsv4.cache.disk import DiskCache, DiskLookup, DiskMatch, LoadedPrefix
from dsv4.cache.prefix import TokensOf
from dsv4.config import PAGE_TOKENS
from dsv4.engine.config import WindowPolicy


class DiskPrefixes:
    """Stored prefixes on disk, of which the policy keeps states."""

    def __init__(self, disk: DiskCache, policy: WindowPolicy) -> None:
        self.disk, self.policy = disk, policy

    def lookup(self, tokens: TokensOf, salt: str | None) -> DiskLookup:
        """For a new request, whose tokens only grow."""
        return DiskLookup(self.disk.keys(tokens, salt))

    def find(self, lookup: DiskLookup, count: int, in_memory: int) -> DiskMatch | None:
        """What the first `count` tokens find on disk that is longer by a block than their prefix in memory."""
        if in_memory + PAGE_TOKENS > count:
            return None
        if not lookup.done:
            lookup.found, lookup.done = self.disk.find(lookup.keys, count), True
        return lookup.found if lookup.found and lookup.found.length >= in_memory + PAGE_TOKENS else None

    def load(self, match: DiskMatch, first: int) -> LoadedPrefix | None:
        """As `DiskCache.load`."""
        return self.disk.load(match, first)

    def begin(self, lookup: DiskLookup, tokens: int) -> None:
        """A request begins, with `tokens` of its tokens from the disk. If it gives way, it is looked up again."""
        stats = self.disk.stats
        if lookup.done:
            stats.num_hits += tokens > 0
            stats.num_misses += tokens == 0
            stats.external_prefix_cache_hits += tokens
            lookup.found, lookup.done = None, False

    def store(self, lookup: DiskLookup, length: int, pages: Sequence[int], entry: PrefixEntry) -> None:
        """Keep the blocks of the first `length` tokens, which lie in `pages`, and their state if the policy says so."""
        snapshot = entry.snapshot if self.policy.keeps_state(length) else None
        self.disk.store(lookup.keys, length, pages, snapshot)
