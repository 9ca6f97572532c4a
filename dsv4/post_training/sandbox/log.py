"""Append-only log of a sandbox session: lines of JSON, each on disk before the session goes on."""

import fcntl
import json
import os
import shutil
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv4.post_training.sandbox.interface import SandboxError

VERSION = 1


@dataclass(slots=True)
class Step:
    """One request of a session. `ended` is None where the log stops between its begin and its end."""

    sequence: int
    began: dict[str, Any]
    ended: dict[str, Any] | None = None
    earlier: bool = False  # begun by an earlier session

    def describe(self) -> str:
        return f"{self.began['do']} {self.began['asked']}"


class SessionLog:
    """Steps of a log file, which one process at a time may hold open. They are read when they are asked for.

    A last line that was cut off while it was written is removed: what it told of had not been answered yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise SandboxError(f"{path} is in use by another session") from None
        self._size = 0  # of the file, in whole lines
        self._places = array("q")  # of each step's begin and end in the file; -1 without an end
        try:
            self._recover()
        except BaseException:
            self._file.close()
            raise
        self._earlier = len(self)

    def _recover(self) -> None:
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                self._take(number, line)
                self._size += len(line)
        if self._size < self.path.stat().st_size:
            self._file.truncate(self._size)
            os.fsync(self._file.fileno())
        if not self._size:
            self._append({"version": VERSION})
            _sync_folder(self.path.parent)

    def _take(self, number: int, line: bytes) -> None:
        """Note the place of a record."""
        try:
            record = json.loads(line)
            if number == 1:
                if record["version"] != VERSION:
                    raise SandboxError(f"{self.path} has version {record['version']}; this reads {VERSION}")
            elif record["event"] == "began":
                self._places.extend((self._size, -1))
            else:
                self._places[2 * record["sequence"] + 1] = self._size
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise SandboxError(f"{self.path}, line {number}: not a record of a session: {error!r}") from None

    def __len__(self) -> int:
        """Number of steps."""
        return len(self._places) // 2

    def step(self, number: int) -> Step:
        """A step as the file has it."""
        began, ended = self._places[2 * number : 2 * number + 2]
        return Step(number, self._read(began), self._read(ended) if ended >= 0 else None, number < self._earlier)

    def begin(self, request: dict[str, Any]) -> Step:
        step = Step(len(self), {"event": "began", "sequence": len(self), **request})
        self._places.extend((self._append(step.began), -1))
        return step

    def end(self, step: Step, outcome: dict[str, Any]) -> None:
        step.ended = {"event": "ended", "sequence": step.sequence, **outcome}
        self._places[2 * step.sequence + 1] = self._append(step.ended)

    def _append(self, record: dict[str, Any]) -> int:
        """Write a record; its place in the file."""
        line, place = json.dumps(record).encode() + b"\n", self._size
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]  # a part, where the disk is filling
            os.fsync(self._file.fileno())
        except BaseException:
            self._file.truncate(place)  # or the next record would lie behind half a line
            raise
        self._size += len(line)
        return place

    def _read(self, place: int) -> dict[str, Any]:
        with self.path.open("rb") as file:
            file.seek(place)
            return json.loads(file.readline())

    def close(self) -> None:
        self._file.close()


class SnapshotFolder:
    """Archives of file trees beside a log, each named by its digest."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __contains__(self, digest: str) -> bool:
        return (self.path / digest).exists()

    def save(self, digest: str, data: bytes) -> None:
        target = self.path / digest
        if target.exists():
            return
        self.path.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(".part")
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
        _sync_folder(self.path)

    def load(self, digest: str) -> bytes:
        try:
            return (self.path / digest).read_bytes()
        except FileNotFoundError:
            raise SandboxError(f"snapshot {digest} is missing in {self.path}") from None

    def clear(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def remove(self, digest: str) -> None:
        (self.path / digest).unlink(missing_ok=True)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
