"""The thread that writes prefixes to the disk: jobs wait in a bounded queue, and are dropped where it is full."""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from dsv4.cache.disk.folder import CacheFolder, FolderBusyError
from dsv4.cache.disk.index import EMPTY_BYTES, Index, StoredState, Trouble, trouble
from dsv4.cache.disk.keys import serving_tails, state_key
from dsv4.cache.disk.records import BLOCK, STATE, Place, Record
from dsv4.cache.disk.stats import DiskCacheStats
from dsv4.cache.state import Snapshot

logger = logging.getLogger("dsv4.cache.disk")

MAX_PENDING_BYTES = 256 << 20  # of jobs that wait
MAX_PENDING_JOBS = 256


@dataclass(frozen=True)
class StateToWrite:
    """A state after the blocks of key `block` and the tokens `tail`, as a `StoredState`, and the tail's packed page."""

    block: bytes
    tail: bytes
    page: Tensor | None
    snapshot: Snapshot

    @property
    def key(self) -> bytes:
        return state_key(self.block, self.tail)

    def payload(self) -> bytes:
        page = b"" if self.page is None else self.page.numpy().tobytes()
        return page + self.snapshot.to_bytes()


@dataclass(frozen=True)
class WriteJob:
    """Copies of the parts of one prefix that are to be written.

    `path`: keys of all its blocks, those of `keys` among them. Their files count as used, and so do those of `used`.
    """

    depth: int  # number of the first block
    keys: list[bytes] = field(default_factory=list)
    blocks: Tensor | None = None  # uint8 [keys, bytes per page]
    state: StateToWrite | None = None
    path: Sequence[bytes] = ()
    used: frozenset[int] = frozenset()
    check: bool = False  # the index seems damaged

    @property
    def num_bytes(self) -> int:
        blocks = 0 if self.blocks is None else self.blocks.nbytes
        return blocks + (0 if self.state is None else self.state.snapshot.num_bytes)


@dataclass(frozen=True)
class DistrustedPrefix:
    """A prefix whose blocks and states may be wrong: keys of its blocks, and after each the tails of its states."""

    path: Sequence[bytes]
    states: Sequence[tuple[bytes, Sequence[bytes]]]


class Writer:
    """Writes jobs in a thread of its own, within `max_bytes` over all processes (None: no bound).

    Nothing that happens here reaches whoever submits: the first error of the disk is logged, and no more is stored.
    """

    def __init__(self, folder: CacheFolder, max_bytes: int | None, stats: DiskCacheStats) -> None:
        self.folder, self.max_bytes, self.stats = folder, max_bytes, stats
        self.off = False  # after an error of the disk
        self._jobs: deque[WriteJob] = deque()
        self._bytes = 0
        self._busy = True  # the thread has work in its hands
        self._closed = False
        self._was_busy = False  # another process held the lock for long, which is logged once
        self._reported_size = False  # that a prefix was larger than the budget
        self._pending: set[bytes] = set()  # keys of blocks and states on their way
        self._lost: set[int] = set()  # files that are gone or damaged, until they are forgotten
        self._distrusted: list[DistrustedPrefix] = []  # until they are forgotten
        self._changed = threading.Condition()
        self._index: Index | None = None
        self._thread = threading.Thread(target=self._run, name="dsv4-disk-cache", daemon=True)
        self._thread.start()

    def is_pending(self, key: bytes) -> bool:
        """True if the block or state of a key waits to be written."""
        return key in self._pending

    @property
    def lost(self) -> frozenset[int]:
        """Files that cannot be read though the index may have them still; asked before the index, none is missed."""
        return frozenset(self._lost)

    def forget(self, file: int) -> None:
        """Remove a file that is damaged or gone, at the next job if this one finds no turn."""
        self._lost.add(file)
        self.submit(WriteJob(0))

    @property
    def distrusts(self) -> bool:
        """True while distrusted prefixes are still in the folder."""
        return bool(self._distrusted)

    def distrust(self, prefixes: Sequence[DistrustedPrefix]) -> None:
        """Remove the files of prefixes, and drop all that waits."""
        with self._changed:
            self._jobs.clear()
            self._pending.clear()
            self._bytes = 0
            self._distrusted += prefixes
        self.submit(WriteJob(0))

    def fits(self, index: Index | None, num_bytes: int, files: Collection[int]) -> bool:
        """True if the budget can hold `num_bytes` beside files that stay; False is logged, once."""
        if self.max_bytes is None:
            return True
        kept = 0 if index is None else index.bytes_of(files)
        if kept + num_bytes + EMPTY_BYTES <= self.max_bytes:
            return True
        self._report_size(kept)
        return False

    def submit(self, job: WriteJob) -> None:
        """Queue a job, or drop it where the queue is full."""
        with self._changed:
            if self.off or self._closed:
                return
            if len(self._jobs) >= MAX_PENDING_JOBS or (self._jobs and self._bytes + job.num_bytes > MAX_PENDING_BYTES):
                self.stats.num_dropped_writes += 1
                return
            self._jobs.append(job)
            self._bytes += job.num_bytes
            self._pending.update(_keys(job))
            self._changed.notify_all()

    def flush(self, seconds: float | None = None) -> bool:
        """Wait until all is written; False after `seconds`."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._jobs and not self._busy, seconds)

    def close(self, seconds: float | None = None) -> None:
        """Write what waits and end the thread, or leave it behind after `seconds`."""
        end = None if seconds is None else time.monotonic() + seconds
        with self._changed:
            self._closed = True  # what is in the queue is written yet
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:  # which may collect the cache's owner
            self.flush(seconds)
            self._thread.join(None if end is None else max(0.0, end - time.monotonic()))

    def disown(self) -> None:
        """In a forked process, which has no such thread: nothing waits, and nothing is stored."""
        self.off = self._closed = True
        self._jobs.clear()
        self._busy, self._changed = False, threading.Condition()

    # In the thread

    def _run(self) -> None:
        self._guard(self._clean_up)
        while (job := self._next()) is not None:
            self._guard(lambda job=job: self._write(job))
            with self._changed:
                self._pending.difference_update(_keys(job))
        if self._index is not None:
            self._index.close()

    def _next(self) -> WriteJob | None:
        with self._changed:
            self._busy = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._jobs or self._closed)
            if not self._jobs:
                return None
            self._busy = True
            job = self._jobs.popleft()
            self._bytes -= job.num_bytes
            return job

    def _guard(self, work: object) -> None:
        """Run a piece of work under the folder's lock. Errors end here; a damaged index is replaced, once a job."""
        assert callable(work)
        for attempt in range(2):
            if self.off:
                return
            try:
                self.folder.create()
                with self.folder.lock():
                    try:
                        work()
                    except sqlite3.Error as error:
                        if attempt or trouble(error) is not Trouble.DAMAGE:
                            raise
                        self._replace_index(error)
                        continue
            except FolderBusyError as error:
                if not self._was_busy:
                    logger.warning("disk cache: %s for long: what is not written meanwhile is dropped", error)
                self._was_busy = True
                self.stats.num_dropped_writes += 1
            except sqlite3.Error as error:
                if trouble(error) is Trouble.BUSY:
                    self.stats.num_dropped_writes += 1
                else:
                    self._give_up(error)
            except Exception as error:  # no request may fail for it
                self._give_up(error)
            return

    def _give_up(self, error: Exception) -> None:
        logger.warning("disk cache %s: nothing more is stored: %s: %s", self.folder.path, type(error).__name__, error)
        with self._changed:
            self.off = True
            self._jobs.clear()
            self._pending.clear()
            self._bytes = 0

    def _replace_index(self, error: sqlite3.Error) -> None:
        damaged = self.folder.index_path()
        logger.warning("disk cache: the index %s is damaged and begins anew: %s", damaged, error)
        self.stats.num_damaged_files += 1
        if self._index is not None:
            self._index.close()
            self._index = None
        if damaged is not None:
            self.folder.replace_index(damaged)
        self._open()

    def _open(self) -> Index:
        """The index that counts now, which is another after one was damaged; what is new to us is cleaned up."""
        index = self._index
        if index is not None and not (index.is_in_place and index.path == self.folder.index_path()):
            index.close()
            self._index = None
        if self._index is None:
            self._index = self.folder.open_index()
            self.folder.remove_leftovers(self._index)
        return self._index

    def _clean_up(self) -> None:
        self._make_room(self._open(), 0, 0, ())

    def _write(self, job: WriteJob) -> None:
        index = self._open()
        if job.check:
            index.check()
        if self._forget(index) and _keys(job):  # its parts come from what is distrusted
            self.stats.num_dropped_writes += 1
            return
        there = index.blocks(job.path)
        reached = _reached(job, there)
        used = job.used.union(there[key].file for key in reached if key in there)
        if used:
            index.touch(used)
        records = self._records(job, reached, there, index)
        written = not records or self._store(job, records, used, index)
        if not written or (len(reached) < len(job.path) and _keys(job)):
            self.stats.num_dropped_writes += 1
        self._keep_budget(index)

    def _store(self, job: WriteJob, records: list[Record], used: frozenset[int], index: Index) -> bool:
        """Write records as one file, if there is or can be room for it beside the files that the prefix uses."""
        size = sum(record.num_bytes for record in records)
        if not self._make_room(index, size, len(records) + len(used), used):
            return False
        number, places = self.folder.write(records)
        try:
            self._enter(index, job, number, size, records, places)
        except BaseException:
            self.folder.remove([number])  # of which nobody would know
            raise
        index.touch([*used, number])  # at once: the end of a prefix is evicted before its beginning
        self.stats.num_writes += 1
        self.stats.kv_offload_store_bytes += size
        return True

    def _forget(self, index: Index) -> bool:
        """Remove the files that were lost, and those of distrusted prefixes; True if there are such."""
        lost, distrusted = set(self._lost), list(self._distrusted)
        files = set(lost)
        for prefix in distrusted:
            files.update(place.file for place in index.blocks(prefix.path).values())
            files.update(state.place.file for block, tails in prefix.states for state in index.states(block, tails))
        if files:
            index.forget(list(files))
            self.folder.remove(files)
        self._lost -= lost
        del self._distrusted[: len(distrusted)]
        return bool(distrusted)

    @staticmethod
    def _enter(
        index: Index, job: WriteJob, number: int, size: int, records: list[Record], places: Sequence[Place]
    ) -> None:
        """Enter a file's records in the index."""
        placed = list(zip(records, places, strict=True))
        blocks = {record.key: place for record, place in placed if record.kind == BLOCK}
        states = [StoredState(job.state.block, job.state.tail, p) for r, p in placed if r.kind == STATE and job.state]
        index.add(number, size, job.depth, blocks, states)

    def _records(self, job: WriteJob, reached: Sequence[bytes], there: Collection[bytes], index: Index) -> list[Record]:
        """Parts of a job that are not there yet: another process may have written some since."""
        records: list[Record] = []
        if job.blocks is not None:
            wanted = set(reached).difference(there)
            rows = job.blocks.numpy()
            records += [Record(BLOCK, k, rows[i].tobytes()) for i, k in enumerate(job.keys) if k in wanted]
        state = job.state if len(reached) == len(job.path) else None
        if state is not None and not index.states(state.block, serving_tails(state.tail)):
            records.append(Record(STATE, state.key, state.payload()))
        return records

    def _make_room(self, index: Index, num_bytes: int, entries: int, keep: Collection[int]) -> bool:
        """Evict until a file of `num_bytes`, with so many entries of the index, fits into the budget. False: never.

        `keep`: files that stay. They hold the beginning of the prefix that is stored, without which nobody finds its
        end.
        """
        if self.max_bytes is None:
            return True
        needed = num_bytes + index.log_bytes(entries)
        if num_bytes and not self.fits(index, needed, keep):
            return False
        if self._excess(index, needed) > 0:
            index.checkpoint()
        while (excess := self._excess(index, needed)) > 0:
            evicted = index.evict(excess, keep)
            if not evicted:
                if num_bytes:
                    self._report_size(index.bytes_of(keep))
                return False
            self.folder.remove(evicted)
            self.stats.num_evicted_files += len(evicted)
            index.checkpoint()  # what was evicted is still in the log
        return True

    def _keep_budget(self, index: Index) -> None:
        """At the end of a job the write-ahead log may be larger than what was reserved for it."""
        if self._excess(index, 0) > 0:
            index.checkpoint()

    def _excess(self, index: Index, needed: int) -> int:
        """Bytes by which the folder is over the budget, `needed` more included."""
        if self.max_bytes is None:
            return 0
        return index.total_bytes() + self.folder.index_bytes() + needed - self.max_bytes

    def _report_size(self, kept: int) -> None:
        if not self._reported_size:
            self._reported_size = True
            text = "disk cache %s: a prefix does not fit into a budget of %d bytes: only its first %d bytes are stored"
            logger.warning(text, self.folder.path, self.max_bytes, kept)


def _reached(job: WriteJob, there: Collection[bytes]) -> Sequence[bytes]:
    """The path's blocks before the first that is neither there nor in the job: a look-up ends where one is missing."""
    present = {*there, *job.keys}
    return job.path[: next((i for i, key in enumerate(job.path) if key not in present), len(job.path))]


def _keys(job: WriteJob) -> list[bytes]:
    return job.keys if job.state is None else [*job.keys, job.state.key]
