"""The index of a folder: which file has the record of a key, and which files were used last. SQLite in WAL mode.

Every method may raise sqlite3.Error; `trouble` says which kind of it. One thread at a time uses an Index; several
processes and threads have the same file open, each through its own.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from dsv4.cache.disk.records import Place

SCHEMA = """
CREATE TABLE files (id INTEGER PRIMARY KEY, bytes INTEGER NOT NULL, depth INTEGER NOT NULL,
                                  used INTEGER NOT NULL);
CREATE INDEX files_by_use ON files (used, depth DESC, bytes);
CREATE TABLE blocks (key BLOB PRIMARY KEY, file INTEGER NOT NULL, offset INTEGER NOT NULL,
                                   bytes INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX blocks_of_file ON blocks (file);
CREATE TABLE states (block BLOB, tail BLOB, file INTEGER NOT NULL, offset INTEGER NOT NULL,
                                   bytes INTEGER NOT NULL, PRIMARY KEY (block, tail)) WITHOUT ROWID;
CREATE INDEX states_of_file ON states (file);
"""
VARIABLES = 500  # keys per query
CHECKPOINT_PAGES = 64  # of the write-ahead log, which counts towards the budget
CHECKPOINT_MILLISECONDS = 200  # that one waits for readers
LOG_PAGE_BYTES = 4096 + 24
OTHER_PAGES = 16  # that a transaction writes beside two per record
EMPTY_BYTES = 1 << 16  # of an empty index with its shared memory
WRITER_SECONDS, READER_SECONDS = 10.0, 0.5  # that an index waits for others


class Trouble(Enum):
    """Kinds of errors of SQLite."""

    BUSY = "busy"  # another process holds the index longer than we wait
    DISK = "disk"  # no room, no permission, an error of the device
    DAMAGE = "damage"


class StoredState(NamedTuple):
    """A state in the index: after the blocks of a key and the tokens `tail` (with `keys.WITH_MTP`, if it has that)."""

    block: bytes
    tail: bytes
    place: Place


_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL, sqlite3.SQLITE_INTERRUPT}
_DISK = {
    sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_AUTH, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_NOLFS,
}  # fmt: skip

_CUT = {sqlite3.SQLITE_IOERR_SHORT_READ, sqlite3.SQLITE_IOERR_READ, sqlite3.SQLITE_IOERR_CORRUPTFS}


def trouble(error: sqlite3.Error) -> Trouble:
    """The kind of an error; what is neither waiting nor the disk's fault comes of a damaged index."""
    extended = getattr(error, "sqlite_errorcode", None) or sqlite3.SQLITE_ERROR
    if extended in _CUT:
        return Trouble.DAMAGE
    code = extended & 0xFF
    return Trouble.BUSY if code in _BUSY else Trouble.DISK if code in _DISK else Trouble.DAMAGE


class Index:
    """An open index. `writes`: False for a thread that only looks up; it waits little for others."""

    def __init__(self, path: Path, writes: bool) -> None:
        self.path = path
        self._as_it_was: list[tuple[int, int]] | None = None  # an index that is read without its log, and the log
        if writes or os.access(path, os.W_OK):
            self._db = _connect(path, "rw", WRITER_SECONDS if writes else READER_SECONDS)
        else:
            self._db = self._open_to_read()
        try:
            self._inode = path.stat().st_ino
            if writes:
                self._db.execute("PRAGMA synchronous = NORMAL")
                self._db.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
        except BaseException:
            self._db.close()
            raise

    @staticmethod
    def create(path: Path) -> None:
        """Write an empty index. Nobody may open it before."""
        db = _connect(path, "rwc", 0.0)
        try:
            db.execute("PRAGMA auto_vacuum = FULL")
            db.execute("PRAGMA journal_mode = WAL")
            db.executescript(SCHEMA)
        finally:
            db.close()

    def close(self) -> None:
        self._db.close()

    @property
    def is_in_place(self) -> bool:
        """False once the file is gone, another has its name, or it is read without its log and has changed."""
        try:
            is_there = self.path.stat().st_ino == self._inode
            return is_there and (self._as_it_was is None or self._as_it_was == self._as_it_is())
        except (FileNotFoundError, NotADirectoryError):
            return False

    def _open_to_read(self) -> sqlite3.Connection:
        """In a folder that is another's: with the log of a process that writes; without one, as the file is."""
        db = _connect(self.path, "ro", READER_SECONDS)
        try:
            db.execute("SELECT id FROM files LIMIT 1").fetchall()
            return db
        except sqlite3.OperationalError:
            db.close()
        self._as_it_was = self._as_it_is()
        return _connect(self.path, "ro&immutable=1", READER_SECONDS)

    def _as_it_is(self) -> list[tuple[int, int]]:
        """Times of the last change and sizes of the index and its log, if there is one."""
        files = [self.path, *self.path.parent.glob(f"{self.path.name}-wal")]
        return [(found.st_mtime_ns, found.st_size) for found in (file.stat() for file in files)]

    def blocks(self, keys: Sequence[bytes]) -> dict[bytes, Place]:
        """Places of those of the keys that are here."""
        return {
            key: Place(*place)
            for marks, some in _parts(keys)
            for key, *place in self._db.execute(
                f"SELECT key, file, offset, bytes FROM blocks WHERE key IN ({marks})", some
            )
        }

    def with_states(self, blocks: Sequence[bytes]) -> set[bytes]:
        """Those of the blocks at which states hang; how many others there are does not count."""
        query = (
            "WITH asked(key) AS (VALUES {}) SELECT key FROM asked WHERE EXISTS (SELECT 1 FROM states WHERE block = key)"
        )
        return {key for marks, some in _parts(blocks, "(?)") for (key,) in self._db.execute(query.format(marks), some)}

    def states(self, block: bytes, tails: Sequence[bytes]) -> list[StoredState]:
        """The states of these tails, the longest first; one seek per tail."""
        found = self._db.execute(
            f"SELECT tail, file, offset, bytes FROM states WHERE block = ? AND tail IN ({','.join('?' * len(tails))})"
            " ORDER BY length(tail) DESC",
            (block, *tails),
        )
        return [StoredState(block, tail, Place(*place)) for tail, *place in found]

    def add(self, file: int, num_bytes: int, depth: int, blocks: dict[bytes, Place], states: list[StoredState]) -> None:
        """Enter a file with its records. `depth`: number of its first block; deeper files are evicted first."""
        with self._transaction():
            self._db.execute(
                "INSERT INTO files SELECT ?, ?, ?, coalesce(max(used), 0) + 1 FROM files", (file, num_bytes, depth)
            )
            self._db.executemany(
                "INSERT OR REPLACE INTO blocks VALUES (?, ?, ?, ?)", [(k, *p) for k, p in blocks.items()]
            )
            self._db.executemany(
                "INSERT OR REPLACE INTO states VALUES (?, ?, ?, ?, ?)", [(b, t, *p) for b, t, p in states]
            )

    def touch(self, files: Iterable[int]) -> None:
        """Files were used now, all together: of those the deeper ones are evicted first."""
        with self._transaction():
            (now,) = self._db.execute("SELECT coalesce(max(used), 0) + 1 FROM files").fetchone()
            self._db.executemany("UPDATE files SET used = ? WHERE id = ?", [(now, file) for file in files])

    def evict(self, num_bytes: int, keep: Collection[int] = ()) -> list[int]:
        """Forget files of at least `num_bytes` in all, the ones used longest ago first, but none of `keep`."""
        files: list[int] = []
        with self._transaction():
            for file, size in self._db.execute("SELECT id, bytes FROM files ORDER BY used, depth DESC").fetchall():
                if num_bytes <= 0:
                    break
                if file not in keep:
                    num_bytes -= size
                    files.append(file)
            self._forget(files)
        return files

    def forget(self, files: Sequence[int]) -> None:
        with self._transaction():
            self._forget(files)

    def files(self) -> dict[int, int]:
        """Bytes of every file."""
        return dict(self._db.execute("SELECT id, bytes FROM files"))

    def bytes_of(self, files: Iterable[int]) -> int:
        """Bytes of some files; those that are not here have none."""
        query = "SELECT bytes FROM files WHERE id = ?"
        return sum(size for file in files for (size,) in self._db.execute(query, (file,)))

    def total_bytes(self) -> int:
        """Bytes of all files."""
        return int(self._db.execute("SELECT total(bytes) FROM files").fetchone()[0])

    def log_bytes(self, entries: int) -> int:
        """Bytes by which the write-ahead log may grow as so many records and used files are entered."""
        (pages,) = self._db.execute("PRAGMA page_count").fetchone()
        return (OTHER_PAGES + min(2 * entries, pages)) * LOG_PAGE_BYTES

    def checkpoint(self) -> None:
        """Move the write-ahead log into the index and cut it to nothing, unless somebody reads for long."""
        self._db.execute(f"PRAGMA busy_timeout = {CHECKPOINT_MILLISECONDS}")
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        self._db.execute(f"PRAGMA busy_timeout = {int(WRITER_SECONDS * 1000)}")

    def check(self) -> None:
        """sqlite3.DatabaseError where the index is damaged."""
        found = self._db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise sqlite3.DatabaseError(found)
        self.files()
        self.blocks([b""])
        self.with_states([b""])

    def _forget(self, files: Sequence[int]) -> None:
        for table, column in (("files", "id"), ("blocks", "file"), ("states", "file")):
            self._db.executemany(f"DELETE FROM {table} WHERE {column} = ?", [(file,) for file in files])

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise


def _connect(path: Path, mode: str, seconds: float) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    return sqlite3.connect(uri, timeout=seconds, isolation_level=None, check_same_thread=False, uri=True)


def _parts(keys: Sequence[bytes], mark: str = "?") -> Iterator[tuple[str, Sequence[bytes]]]:
    """Keys in groups that fit into a query, with as many marks."""
    for first in range(0, len(keys), VARIABLES):
        some = keys[first : first + VARIABLES]
        yield ",".join([mark] * len(some)), some
