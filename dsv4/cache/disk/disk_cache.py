"""DiskCache: prefixes of one model in a folder. The engine's thread looks up, loads and submits; another one writes."""

from __future__ import annotations

import errno
import logging
import os
import sqlite3
import weakref
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dsv4.cache.cache import Cache
from dsv4.cache.disk.folder import CacheFolder
from dsv4.cache.disk.index import EMPTY_BYTES, Index, StoredState, Trouble, trouble
from dsv4.cache.disk.keys import TOKEN_BYTES, WITH_MTP, PrefixKeys, root_key, serving_tails, state_key
from dsv4.cache.disk.packing import pack_pages, pack_tail, unpack_pages
from dsv4.cache.disk.records import BLOCK, STATE, DamagedFileError, Place, Record, read_record
from dsv4.cache.disk.stats import DiskCacheStats
from dsv4.cache.disk.writer import DistrustedPrefix, StateToWrite, WriteJob, Writer
from dsv4.cache.prefix import TokensOf
from dsv4.cache.state import Snapshot
from dsv4.config import PAGE_TOKENS

logger = logging.getLogger("dsv4.cache.disk")

CLOSE_SECONDS = 60.0  # that the end of the process waits for the disk

_writers: weakref.WeakSet[Writer] = weakref.WeakSet()  # of this process


def _disown() -> None:
    """In a forked process: the writers' threads are not there."""
    for writer in list(_writers):
        writer.disown()
    _writers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disown)


@dataclass(frozen=True)
class DiskMatch:
    """A prefix on disk that a sequence begins with: whole blocks, and the state to go on from, or None to replay."""

    keys: Sequence[bytes]  # of the blocks
    places: Sequence[Place]  # as many
    state: StoredState | None
    length: int  # tokens that need no computation

    @property
    def common(self) -> int:
        """Tokens in whole blocks."""
        return len(self.places) * PAGE_TOKENS

    @property
    def num_blocks(self) -> int:
        """Blocks that are needed: for a replay all, for a state those before it."""
        return len(self.places) if self.state is None else self.length // PAGE_TOKENS

    @property
    def files(self) -> frozenset[int]:
        used = {place.file for place in self.places[: self.num_blocks]}
        return frozenset(used if self.state is None else used | {self.state.place.file})


@dataclass(eq=False)
class DiskLookup:
    """Of one request: its keys, each hashed once, and what was found as it waited, looked up once."""

    keys: PrefixKeys
    found: DiskMatch | None = None
    done: bool = False

    @property
    def common(self) -> int:
        """Tokens in whole blocks on disk, as far as it was looked up."""
        return 0 if self.found is None else self.found.common


@dataclass(frozen=True)
class LoadedPrefix:
    """Entries of each compressor for the blocks that were asked for and for the tail; state, None for a replay."""

    entries: tuple[Tensor, ...]
    num_pages: int  # that the entries fill
    snapshot: Snapshot | None

    def entries_after(self, pages: int) -> list[Tensor]:
        """The entries without those of the first `pages` pages."""
        return [entries[pages * len(entries) // max(1, self.num_pages) :] for entries in self.entries]


class DiskCache:
    """Prefixes in `path` that were computed by the model of this identity.

    `max_bytes`: of the folder, all processes together. `replay_tokens`: tokens at the end of the stored blocks whose
    computation gives the state there; None: only states that are stored count. No method raises for what is on disk.
    """

    def __init__(
        self, path: Path, identity: bytes, cache: Cache, max_bytes: int | None, replay_tokens: int | None
    ) -> None:
        self.stats = DiskCacheStats()
        self.folder = CacheFolder(path)
        self.cache, self.replay_tokens = cache, replay_tokens
        self.identity = identity
        self._index: Index | None = None
        self._reported = False  # that the index cannot be read
        for writer in list(_writers):  # what this process has written before is found
            if writer.folder.path == self.folder.path:
                writer.flush(CLOSE_SECONDS)
        self._writer = Writer(self.folder, max_bytes, self.stats)
        _writers.add(self._writer)
        self._finalizer = weakref.finalize(self, self._writer.close, CLOSE_SECONDS)  # at exit, too

    def flush(self) -> None:
        """Wait until all that was stored is on the disk."""
        self._writer.flush(CLOSE_SECONDS)

    def close(self) -> None:
        """Write what waits; nothing is stored after that."""
        self._finalizer()

    def keys(self, tokens: TokensOf, salt: str | None) -> PrefixKeys:
        """Keys of a sequence that only grows."""
        return PrefixKeys(root_key(self.identity, salt), tokens)

    def find(self, keys: PrefixKeys, count: int) -> DiskMatch | None:
        """The longest prefix on disk of a sequence's first `count` tokens; None: there is none."""
        try:
            return self._find(keys, count)
        except (sqlite3.Error, OSError) as error:
            self._report(error)
            return None

    def load(self, match: DiskMatch, first: int) -> LoadedPrefix | None:
        """Read what a match needs, its blocks from number `first` on; None where it is gone or damaged.

        From any thread, one at a time.
        """
        tail = match.state is not None and match.length % PAGE_TOKENS > 0
        size, blocks = self.cache.page_bytes, range(first, match.num_blocks)
        pages = np.empty((len(blocks) + tail, size), dtype=np.uint8)
        place: Place | None = None
        try:
            reader = self.folder.read(match.places[number] for number in blocks)
            for row, number in enumerate(blocks):
                place = match.places[number]
                data = next(reader)
                self.stats.kv_offload_load_bytes += len(data)
                pages[row] = _page(read_record(data, BLOCK, match.keys[number]), size)
            snapshot = None
            if match.state is not None:
                place = match.state.place
                (data,) = self.folder.read([place])
                self.stats.kv_offload_load_bytes += len(data)
                payload = read_record(data, STATE, state_key(match.state.block, match.state.tail))
                if tail:
                    pages[-1] = _page(payload[:size], size)
                    payload = payload[size:]
                snapshot = Snapshot.from_bytes(bytes(payload))
        except FileNotFoundError:
            return self._forget(place)  # evicted by another process
        except (OSError, DamagedFileError, ValueError) as error:
            name = self.folder.entries if place is None else self.folder.file(place.file)
            logger.warning("disk cache: %s cannot be used: %s", name, error)
            if isinstance(error, OSError) and error.errno != errno.EIO:
                return None  # of this process or this moment: too many open files, no permission
            self.stats.num_damaged_files += 1
            return self._forget(place)
        self._writer.submit(WriteJob(first, path=match.keys, used=match.files))
        return LoadedPrefix(unpack_pages(self.cache, torch.from_numpy(pages)), len(pages), snapshot)

    def store(self, keys: PrefixKeys, length: int, pages: Sequence[int], snapshot: Snapshot | None) -> None:
        """Keep the whole blocks of the first `length` tokens, which lie in `pages`, and, if given, the state there."""
        try:
            self._store(keys, length, pages, snapshot)
        except (sqlite3.Error, OSError) as error:
            self._report(error)

    def distrust(self, prefixes: Iterable[tuple[PrefixKeys, int]]) -> None:
        """Forget what is stored of sequences' first tokens, and all that waits to be written: it may be wrong."""
        self._writer.distrust(
            [
                DistrustedPrefix(
                    keys.blocks(count),
                    [(keys.at(number), keys.tails(number, count)) for number in range(count // PAGE_TOKENS + 1)],
                )
                for keys, count in prefixes
            ]
        )

    def _find(self, keys: PrefixKeys, count: int) -> DiskMatch | None:
        if self._writer.distrusts:
            return None
        lost = self._writer.lost
        index = self._open()
        if index is None:
            return None
        blocks = keys.blocks(count)
        found = _readable(index.blocks(blocks), lost)
        depth = next((i for i, key in enumerate(blocks) if key not in found), len(blocks))
        blocks = blocks[:depth]
        state, length = self._longest_state(index, keys, depth, count, lost)
        replay = 0 if self.replay_tokens is None else depth * PAGE_TOKENS - self.replay_tokens
        if replay > length:
            state, length = None, replay
        if not depth and not length:
            return None
        return DiskMatch(blocks, [found[key] for key in blocks], state, length)

    def _longest_state(
        self, index: Index, keys: PrefixKeys, depth: int, count: int, lost: Collection[int]
    ) -> tuple[StoredState | None, int]:
        """Deepest block first: 128 tails are asked for, however many states of other sequences hang there."""
        there = index.with_states([keys.at(number) for number in range(depth + 1)])
        for number in range(depth, -1, -1):
            block = keys.at(number)
            if block in there:
                for state in index.states(block, keys.tails(number, count)):
                    if state.place.file not in lost:
                        return state, number * PAGE_TOKENS + len(state.tail) // TOKEN_BYTES
        return None, 0

    def _store(self, keys: PrefixKeys, length: int, pages: Sequence[int], snapshot: Snapshot | None) -> None:
        if self._writer.off:
            return
        lost = self._writer.lost
        blocks, index = keys.blocks(length), self._open()
        found = {} if index is None else _readable(index.blocks(blocks), lost)
        missing = [i for i, key in enumerate(blocks) if key not in found and not self._writer.is_pending(key)]
        state = None
        if snapshot is not None:
            state = self._state(index, keys, length, pages, snapshot, lost)
        if missing or state is not None:
            size = len(missing) * self.cache.page_bytes + (0 if state is None else state.snapshot.num_bytes)
            if not self._writer.fits(index, size, {place.file for place in found.values()}):
                self.stats.num_dropped_writes += 1  # before the pages are copied, more with every step
                return
            packed = pack_pages(self.cache, [pages[i] for i in missing]) if missing else None
            depth = missing[0] if missing else len(blocks)
            self._writer.submit(WriteJob(depth, [blocks[i] for i in missing], packed, state, blocks))

    def _state(
        self,
        index: Index | None,
        keys: PrefixKeys,
        length: int,
        pages: Sequence[int],
        snapshot: Snapshot,
        lost: Collection[int],
    ) -> StateToWrite | None:
        """The state after a prefix; None where it is on disk, or on its way there."""
        block, tail = keys.at(length // PAGE_TOKENS), keys.tail(length)
        name = tail if snapshot.mtp_streams is None else tail + WITH_MTP
        serving = serving_tails(name)
        if any(self._writer.is_pending(state_key(block, other)) for other in serving):
            return None
        there = [] if index is None else index.states(block, serving)
        if any(state.place.file not in lost for state in there):
            return None
        page = pack_tail(self.cache, pages[length // PAGE_TOKENS], length % PAGE_TOKENS) if tail else None
        return StateToWrite(block, name, page, snapshot)

    def _open(self) -> Index | None:
        """The index for reading; None: there is none yet."""
        if self._index is not None and not self._index.is_in_place:  # it was damaged, and another took its place
            self._index.close()
            self._index = None
        if self._index is None and (path := self.folder.index_path()) is not None:
            self._index = Index(path, writes=False)
        return self._index

    def _forget(self, place: Place | None) -> None:
        if place is not None:
            self._writer.forget(place.file)

    def _report(self, error: sqlite3.Error | OSError) -> None:
        """An error of the index is a miss. One that is damaged is replaced by the writer, which says so."""
        if isinstance(error, sqlite3.Error) and trouble(error) is Trouble.BUSY:
            return
        if self._index is not None:
            self._index.close()
            self._index = None
        if isinstance(error, sqlite3.Error) and trouble(error) is Trouble.DAMAGE and not self._writer.off:
            self._writer.submit(WriteJob(0, check=True))
        elif not self._reported:
            self._reported = True
            logger.warning("disk cache %s cannot be read: %s", self.folder.path, error)


def least_bytes(cache: Cache) -> int:
    """Least `max_bytes` for a cache of this form: room for the file of a short prefix, and for the index of a few."""
    state = Record(STATE, b"", cache.snapshot(0).to_bytes())
    block = Record(BLOCK, b"", bytes(cache.page_bytes))
    return 4 * EMPTY_BYTES + state.num_bytes + 2 * block.num_bytes


def _readable(places: Mapping[bytes, Place], lost: Collection[int]) -> dict[bytes, Place]:
    """Places in files that are not lost."""
    return {key: place for key, place in places.items() if place.file not in lost}


def _page(payload: memoryview, size: int) -> np.ndarray:
    if len(payload) != size:
        raise DamagedFileError(f"a page of {len(payload)} bytes, expected are {size}")
    return np.frombuffer(payload, dtype=np.uint8)
