"""Prefixes in memory: states of sequences that others may go on from, and the pages that those need.

Blocks of PAGE_TOKENS tokens make a trie: a node is a block after all those above it, and holds the block's page. A
stored state hangs at the node of its last whole block; the tokens after that are its tail, with a page of their own.
Nodes exist only on the way to states. Blocks and tails are compared token by token, so that no two prefixes are ever
taken for one. Prefixes of different salts share nothing.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from dsv4.cache.cache import Cache
from dsv4.cache.state import Snapshot
from dsv4.config import PAGE_TOKENS
from dsv4.prefix_digests import next_digest, root_digest

logger = logging.getLogger("dsv4.cache")

TokensOf = Callable[[int, int], list[int]]  # (start, stop) -> token ids of a sequence, fewer where it ends before


@dataclass(eq=False)
class _Block:
    """A node of the trie. The root has neither parent nor page."""

    parent: _Block | None
    tokens: bytes
    page: int
    salt: str | None
    children: dict[bytes, _Block] = field(default_factory=dict)
    entries: dict[bytes, PrefixEntry] = field(default_factory=dict)  # by tail
    known_digest: bytes | None = None


@dataclass(eq=False)
class PrefixEntry:
    """One stored state. `holders`: rows that went on from it and still run; others are evicted before it."""

    block: _Block
    tail: bytes
    page: int | None  # of the tail
    snapshot: Snapshot
    num_bytes: int  # of the snapshot
    holders: int = 0

    @property
    def length(self) -> int:
        return self.snapshot.length


class PrefixMatch(NamedTuple):
    """Stored prefix of a sequence: its longest state, and the number of its tokens in whole stored blocks."""

    entry: PrefixEntry | None
    common: int

    @property
    def length(self) -> int:
        """Tokens that need no computation."""
        return 0 if self.entry is None else self.entry.length


NO_MATCH = PrefixMatch(None, 0)


class PrefixCache:
    """Stores states of a cache's rows, least recently used out first; `max_bytes` bounds snapshots and pages."""

    def __init__(self, cache: Cache, max_bytes: int) -> None:
        self.cache = cache
        self.max_bytes = max_bytes
        self.version = 0  # changes whenever a look-up may find something else
        self.num_pages = 0  # that blocks and tails hold
        self.snapshot_bytes = 0
        self._roots: dict[str | None, _Block] = {}
        self._entries: dict[PrefixEntry, None] = {}  # the one used last is last
        state = cache.snapshot(0).num_bytes
        if 0 < max_bytes < state + cache.page_bytes:  # 0 asks for none
            text = "prefix_cache_bytes is %d: no prefix is kept in memory, as a state has %d bytes and a page %d"
            logger.warning(text, max_bytes, state, cache.page_bytes)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_bytes(self) -> int:
        """Bytes of the snapshots, and of the pages, those that rows hold as well included."""
        return self.snapshot_bytes + self.num_pages * self.cache.page_bytes

    def find(self, tokens: TokensOf, count: int, salt: str | None = None) -> PrefixMatch:
        """The longest stored prefix of a sequence's first `count` tokens."""
        path = self._walk(tokens, count, salt)
        for depth in range(len(path) - 1, -1, -1):
            entry = _longest(path[depth].entries, tokens, depth * PAGE_TOKENS, count)
            if entry is not None:
                return PrefixMatch(entry, (len(path) - 1) * PAGE_TOKENS)
        return PrefixMatch(None, max(0, len(path) - 1) * PAGE_TOKENS)

    def block_pages(self, tokens: TokensOf, count: int, salt: str | None = None) -> list[int]:
        """Pages of those whole blocks of a sequence's first `count` tokens that are here, from the first on."""
        return [block.page for block in self._walk(tokens, count, salt)[1:]]

    def digests(self, limit: int) -> list[bytes]:
        """Digests (`prefix_digests.py`) of stored blocks, at most `limit`, those of the prefixes used last first."""
        found: dict[bytes, None] = {}
        seen: set[_Block] = set()
        for entry in reversed(self._entries):
            block = entry.block
            while block.parent is not None and block not in seen:
                seen.add(block)
                found[_digest(block)] = None
                block = block.parent
            if len(found) >= limit:
                break
        return list(found)[:limit]

    def pages_of(self, entry: PrefixEntry) -> list[int]:
        """An entry's pages, in the order of its tokens."""
        pages = [] if entry.page is None else [entry.page]
        block = entry.block
        while block.parent is not None:
            pages.append(block.page)
            block = block.parent
        return pages[::-1]

    def take(self, slot: int, entry: PrefixEntry) -> None:
        """Let an empty row go on from an entry, which counts as used and is held until `let_go`."""
        self.cache.attach(slot, self.pages_of(entry))
        self.cache.restore(slot, entry.snapshot)
        entry.holders += 1
        self._touch(entry)

    def let_go(self, entry: PrefixEntry) -> None:
        """A row that took an entry has ended."""
        entry.holders -= 1

    def store(self, slot: int, tokens: TokensOf, salt: str | None = None) -> PrefixEntry:
        """Keep what a row holds now, the prefix `tokens` gives; a prefix that is here already counts as used.

        A state that lacks the MTP block's gives way to a row's that has it. Returns the prefix's entry, which is
        evicted at once where it does not fit.
        """
        length = self.cache.lengths[slot]
        pages = self.cache.pages_of(slot)
        depth = length // PAGE_TOKENS
        block = self._roots.get(salt)
        if block is None:
            block = self._roots[salt] = _Block(None, b"", -1, salt)
        for place in range(depth):
            block = self._child(block, _key(tokens, place * PAGE_TOKENS, (place + 1) * PAGE_TOKENS), pages[place])
        tail = _key(tokens, depth * PAGE_TOKENS, length)
        entry = block.entries.get(tail)
        if entry is None:
            snapshot = self.cache.snapshot(slot)
            entry = PrefixEntry(block, tail, self._hold(pages[depth]) if tail else None, snapshot, snapshot.num_bytes)
            block.entries[tail] = entry
            self.version += 1
            self.snapshot_bytes += entry.num_bytes
        elif entry.snapshot.mtp_streams is None and self.cache.has_mtp_streams(slot):
            self.snapshot_bytes -= entry.num_bytes
            entry.snapshot = self.cache.snapshot(slot)
            entry.num_bytes = entry.snapshot.num_bytes
            self.snapshot_bytes += entry.num_bytes
        self._touch(entry)
        while self.num_bytes > self.max_bytes and self._evict_oldest(held=False):
            pass
        return entry

    def evict_until(self, enough: Callable[[], bool]) -> bool:
        """Evict until `enough()`, entries that running rows hold last. False: nothing is left and it is not enough."""
        while not enough():
            if not self._evict_oldest(held=False) and not self._evict_oldest(held=True):
                return False
        return True

    def clear(self) -> None:
        """Evict everything."""
        self.evict_until(lambda: False)

    def _walk(self, tokens: TokensOf, count: int, salt: str | None) -> list[_Block]:
        """The root and the blocks along a sequence's first `count` tokens; empty where the salt has nothing."""
        block = self._roots.get(salt)
        if block is None:
            return []
        path = [block]
        for end in range(PAGE_TOKENS, count + 1, PAGE_TOKENS):
            block = block.children.get(_key(tokens, end - PAGE_TOKENS, end))
            if block is None:
                break
            path.append(block)
        return path

    def _child(self, block: _Block, key: bytes, page: int) -> _Block:
        """The block after another; made, and holding `page`, where it is new."""
        child = block.children.get(key)
        if child is None:
            child = block.children[key] = _Block(block, key, self._hold(page), block.salt)
        return child

    def _touch(self, entry: PrefixEntry) -> None:
        self._entries.pop(entry, None)
        self._entries[entry] = None

    def _hold(self, page: int) -> int:
        self.cache.pool.retain((page,))
        self.num_pages += 1
        return page

    def _drop(self, page: int) -> None:
        self.cache.pool.release((page,))
        self.num_pages -= 1

    def _evict_oldest(self, held: bool) -> bool:
        """Evict the entry used longest ago of those that rows hold, or that none does. False: there is none."""
        entry = next((entry for entry in self._entries if bool(entry.holders) == held), None)
        if entry is None:
            return False
        del self._entries[entry]
        self.version += 1
        self.snapshot_bytes -= entry.num_bytes
        if entry.page is not None:
            self._drop(entry.page)
        block = entry.block
        del block.entries[entry.tail]
        while not block.entries and not block.children:  # nothing is left that needs the block
            if block.parent is None:
                del self._roots[block.salt]
                break
            self._drop(block.page)
            del block.parent.children[block.tokens]
            block = block.parent
        return True


def _digest(block: _Block) -> bytes:
    """Of a block and all above it (`prefix_digests.py`)."""
    path = [block]
    while path[-1].known_digest is None and path[-1].parent is not None:
        path.append(path[-1].parent)
    digest = path[-1].known_digest or root_digest(block.salt)
    for below in reversed(path[:-1]):
        digest = below.known_digest = next_digest(digest, below.tokens)
    return digest


def _key(tokens: TokensOf, start: int, stop: int) -> bytes:
    return array("i", tokens(start, stop)).tobytes()


def _longest(entries: dict[bytes, PrefixEntry], tokens: TokensOf, start: int, count: int) -> PrefixEntry | None:
    """The entry with the longest tail that a sequence has from position `start` on, within its first `count` tokens."""
    if not entries:
        return None
    rest = _key(tokens, start, min(count, start + PAGE_TOKENS))
    width = array("i").itemsize
    for size in range(len(rest), -1, -width):
        entry = entries.get(rest[:size])
        if entry is not None:
            return entry
    return None
