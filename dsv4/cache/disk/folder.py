"""The folder of a disk cache: files of records, the index, and the lock under which both are changed.

Whoever holds the lock is the only writer of all processes, and loses it by dying. So what a holder finds that the index
does not have is the leftover of a dead writer, and the bytes that it counts are all there are. Readers take no lock: a
file that is removed under them is a miss.

An index that is damaged is replaced by one of the next number and never written again: the one of the highest number
counts, and whoever opens it to write removes the others. Processes that have the old one open notice that it is gone.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dsv4.cache.disk.index import Index
from dsv4.cache.disk.keys import FORMAT_VERSION
from dsv4.cache.disk.records import Place, Record, write_records

LOCK_SECONDS = 10.0  # that a write waits for other processes' writes


class FolderBusyError(Exception):
    """Another process writes for longer than we wait."""


class CacheFolder:
    """Paths of a disk cache in `path`, a folder of this format's version below it. Other files there stay."""

    def __init__(self, path: Path) -> None:
        self.path = path / f"v{FORMAT_VERSION}"
        self.entries = self.path / "entries"

    def create(self) -> None:
        """OSError where the folder cannot be made."""
        self.entries.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def lock(self, seconds: float = LOCK_SECONDS) -> Iterator[None]:
        """Only one thread of all processes is inside. FolderBusyError after `seconds`; OSError without locks."""
        import fcntl  # POSIX only

        deadline = time.monotonic() + seconds
        descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise FolderBusyError(f"{self.path} is locked by another process") from None
                    time.sleep(0.005)
            yield
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a process that was forked meanwhile has the descriptor, too
            os.close(descriptor)

    # The index

    def index_path(self) -> Path | None:
        """The index that counts; None: there is none yet."""
        return max(self.path.glob("index.*.sqlite"), key=_number, default=None)

    def open_index(self) -> Index:
        """The index that counts, made where there is none; those before it are removed. Under the lock."""
        current = self.index_path() or self._new_index(0)
        for path in self.path.glob("index.*.sqlite*"):
            if 0 <= _number(path) < _number(current):
                path.unlink(missing_ok=True)
        return Index(current, writes=True)

    def replace_index(self, damaged: Path) -> None:
        """Let an empty index count in the place of one that is damaged, unless another does. Under the lock."""
        if self.index_path() == damaged:
            self._new_index(_number(damaged) + 1)

    def index_bytes(self) -> int:
        """Bytes of the index and its write-ahead log."""
        sizes = 0
        for path in self.path.glob("index.*"):
            try:
                sizes += path.stat().st_size
            except FileNotFoundError:
                continue
        return sizes

    def _new_index(self, number: int) -> Path:
        """An empty index, which has its name only when it is whole: readers take no lock."""
        path, temporary = self.path / f"index.{number}.sqlite", self.path / "new.sqlite"
        for leftover in self.path.glob("new.sqlite*"):
            leftover.unlink()
        Index.create(temporary)
        temporary.rename(path)
        return path

    # Files

    def file(self, number: int) -> Path:
        return self.entries / f"{number:016x}.kv"

    def write(self, records: list[Record]) -> tuple[int, list[Place]]:
        """A new file of records: its number and their places. Under the lock."""
        number = secrets.randbits(63)
        path = self.file(number)
        return number, [Place(number, *place) for place in write_records(path, path.with_suffix(".tmp"), records)]

    def read(self, places: Iterable[Place]) -> Iterator[bytes]:
        """The bytes at places, in their order. OSError where a file is gone; fewer bytes where it is cut."""
        open_number, descriptor = -1, -1
        try:
            for place in places:
                if place.file != open_number:
                    if descriptor >= 0:
                        os.close(descriptor)
                    open_number, descriptor = place.file, -1
                    descriptor = os.open(self.file(place.file), os.O_RDONLY | os.O_CLOEXEC)
                yield os.pread(descriptor, place.num_bytes, place.offset)
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def remove(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self.file(number).unlink(missing_ok=True)

    def remove_leftovers(self, index: Index) -> int:
        """Remove files that the index does not have, and from the index those that are gone. Under the lock.

        Returns the number of files removed.
        """
        known = index.files()
        names = {self.file(number).name: number for number in known}
        found = {path.name: path for path in self.entries.iterdir()}
        leftovers = [path for name, path in found.items() if name not in names and path.suffix in (".kv", ".tmp")]
        for path in leftovers:
            path.unlink(missing_ok=True)
        index.forget([number for name, number in names.items() if name not in found])
        return len(leftovers)


def _number(index: Path) -> int:
    """Number of an index by its name; -1: it is none."""
    middle = index.name.split(".")[1]
    return int(middle) if middle.isdecimal() else -1
