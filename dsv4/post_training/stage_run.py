"""Stages of a long run, each skipped when its result stands; their times and tokens are kept beside them."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType

from dsv4.checkpoint.atomic import new_file
from dsv4.training.report import format_seconds
from dsv4.training.stopping import RunStoppedError

LOG = "stages.json"


@dataclass(frozen=True)
class Stage:
    """A part of a run. `result` is what it leaves behind, whole or not at all; `seconds` what it is expected to take.

    `run` gives its command, or what it does in words, and then does it: the log has that text whenever the result
    stands.
    """

    name: str
    result: Path
    seconds: float
    run: Callable[[], Iterator[str]]


@dataclass(frozen=True)
class StageTime:
    """Wall-clock seconds of a stage, those of a part that was killed left out, and its command."""

    name: str
    command: str
    seconds: float


class StageLog:
    """Times of the stages of a run, in a file of its folder."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / LOG
        self._found: dict[str, StageTime] = {}
        if self._path.exists():
            try:
                records = [StageTime(**record) for record in json.loads(self._path.read_text(encoding="utf-8"))]
            except (ValueError, TypeError) as error:
                raise ValueError(f"{self._path} is damaged: {error}; remove it to go on without the times") from error
            self._found = {record.name: record for record in records}

    @property
    def times(self) -> list[StageTime]:
        return list(self._found.values())

    def add(self, name: str, seconds: float, command: str = "") -> None:
        """Add the time of a stage, or of a part of it."""
        before = self._found.get(name, StageTime(name, "", 0.0))
        self._found[name] = replace(
            before, command=command or before.command, seconds=round(before.seconds + seconds, 1)
        )
        with new_file(self._path) as temporary:
            temporary.write_text(json.dumps([asdict(one) for one in self.times], indent=2) + "\n", encoding="utf-8")


def run_stages(stages: Sequence[Stage], log: StageLog, say: Callable[[str], object]) -> None:
    """Run the stages whose results do not stand, in order. ValueError names the stage that failed."""
    for number, stage in enumerate(stages, 1):
        if stage.result.exists():
            continue
        left = sum(one.seconds for one in stages[number - 1 :] if not one.result.exists())
        say(f"stage {number} of {len(stages)}, {stage.name}; left in all: about {format_seconds(left)}")
        started = time.perf_counter()
        try:
            with stopping_at_sigterm(stage.name):
                for command in stage.run():
                    log.add(stage.name, 0.0, command)
        except ValueError as error:
            raise ValueError(f"stage {stage.name}: {error}") from error
        finally:
            log.add(stage.name, time.perf_counter() - started)
        assert stage.result.exists(), f"{stage.name} left no {stage.result}"


@contextmanager
def stopping_at_sigterm(what: str) -> Generator[None]:
    """Context in which SIGTERM raises RunStoppedError, but for loops inside that save their state first.

    Nothing inside that handles an Exception, as the judging of an answer does, takes it for its own.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Stopped

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except _Stopped:
        raise RunStoppedError(f"stopped by SIGTERM in stage {what}") from None
    finally:
        signal.signal(signal.SIGTERM, before)


class _Stopped(BaseException):
    """SIGTERM came."""
