"""Append-only log of a sandbox session: lines of JSON, each on disk before the session goes on."""

import fcntl
import json
import os
import shutil
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
    """Steps of a log file, which one process at a time may hold open.

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
        try:
            self.steps = self._recover()
        except BaseException:
            self._file.close()
            raise

    def _recover(self) -> list[Step]:
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            self._file.truncate(len(whole))
            os.fsync(self._file.fileno())
        if not whole:
            self._append({"version": VERSION})
            _sync_folder(self.path.parent)
            return []
        steps: list[Step] = []
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                record = json.loads(line)
                if number == 1:
                    if record["version"] != VERSION:
                        raise SandboxError(f"{self.path} has version {record['version']}; this reads {VERSION}")
                elif record["event"] == "began":
                    steps.append(Step(record["sequence"], record, earlier=True))
                else:
                    steps[record["sequence"]].ended = record
            except (KeyError, IndexError, TypeError, ValueError) as error:
                raise SandboxError(f"{self.path}, line {number}: not a record of a session: {error!r}") from None
        return steps

    def begin(self, request: dict[str, Any]) -> Step:
        step = Step(len(self.steps), {"event": "began", "sequence": len(self.steps), **request})
        self._append(step.began)
        self.steps.append(step)
        return step

    def end(self, step: Step, outcome: dict[str, Any]) -> None:
        step.ended = {"event": "ended", "sequence": step.sequence, **outcome}
        self._append(step.ended)

    def _append(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record).encode() + b"\n")
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class SnapshotFolder:
    """Archives of file trees beside a log, each named by its digest."""

    def __init__(self, path: Path) -> None:
        self.path = path

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
