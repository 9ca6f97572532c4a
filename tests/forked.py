"""Processes that begin where all imports are done: forked from a server that has them, for tests that kill many."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(
    [
        *("recipes.v4", "dsv4.data.tasks", "torch._dynamo"),  # v4 has all other recipes of post-training
        *("dsv4.post_training.rollout_service.process", "sqlalchemy.dialects.sqlite", "psycopg"),
    ]
)

HANG = 600.0  # seconds


def end_behind_a_write(main: Callable[[list[str]], int], words: list[str], noted: Path, alike: str = "$^") -> int:
    """Run a command until SIGKILL ends it behind the first write of a path that is not in the file `noted`.

    A write is what renames a whole file or folder to its name. Paths that differ in what `alike` matches are one.
    """

    def dying(rename: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
        def renamed(self: Path, target: Path) -> Path:
            found = rename(self, target)
            name = re.sub(rf"\.[0-9a-f]{{8}}\.|{alike}", "*", str(target))  # temporary names have eight digits
            if name not in (noted.read_text().splitlines() if noted.exists() else ()):
                with noted.open("a") as file:
                    file.write(f"{name}\n")
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        return renamed

    Path.replace, Path.rename = dying(Path.replace), dying(Path.rename)  # type: ignore[assignment, method-assign]
    return main(words)


def kill_behind_each_write(start: Callable[[], BaseProcess]) -> int:
    """Start a command of `end_behind_a_write` until it comes to its end; how often it was killed."""
    kills = 0
    while True:
        process = start()
        process.join(HANG)
        if process.exitcode == 0:
            return kills
        assert process.exitcode == -signal.SIGKILL
        kills += 1
