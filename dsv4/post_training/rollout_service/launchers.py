"""Launchers of rollout workers: processes of this machine, or Ray actors on any machine of a cluster."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Literal, Protocol

import dsv4
from dsv4.post_training.rollout_service.process import WorkerPlan

LauncherName = Literal["process", "ray"]
_END_SECONDS = 5.0
_SHOWN = 300  # characters of a log in an error


class Launched(Protocol):
    """A started worker."""

    def ended(self) -> str | None:
        """Its end in words; None while it lives."""
        ...

    def kill(self) -> None:
        """End it at once."""
        ...


class Launcher(Protocol):
    def start(self, plan: WorkerPlan, place: int) -> Launched:
        """Start the worker of a place, numbered from 0."""
        ...

    def close(self) -> None:
        """Give back what all workers share."""
        ...


class WorkerProcess:
    """A worker in a process of this machine. What it prints is in `log`."""

    def __init__(self, plan: WorkerPlan, log: Path, threads: int) -> None:
        paths = [str(Path(dsv4.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        }  # fmt: skip
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "dsv4.post_training.rollout_service.process"],
                stdin=subprocess.PIPE, stdout=output, stderr=output, env=environment,
            )  # fmt: skip
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended; `ended` says so
            self._process.stdin.write(f"{plan.to_json()}\n".encode())
            self._process.stdin.flush()

    @property
    def pid(self) -> int:
        return self._process.pid

    def ended(self) -> str | None:
        status = self._process.poll()
        if status is None:
            return None
        self._close_input()
        how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
        said = self._log.read_text(encoding="utf-8", errors="replace").strip()[-_SHOWN:]
        last = said.splitlines()[-1] if said else ""
        return f"{how} ({last}; {self._log})" if last else how

    def kill(self) -> None:
        self._process.kill()
        self._close_input()
        with contextlib.suppress(subprocess.TimeoutExpired):  # the system still frees its memory; it runs no more
            self._process.wait(_END_SECONDS)

    def _close_input(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()


class ProcessLauncher:
    """Starts workers as processes of this machine, each with `threads` threads; their logs are in `folder`."""

    def __init__(self, folder: Path, threads: int) -> None:
        self._folder, self._threads = folder, threads

    def start(self, plan: WorkerPlan, place: int) -> WorkerProcess:
        return WorkerProcess(plan, self._folder / f"worker-{place}.log", self._threads)

    def close(self) -> None:
        """Nothing: processes share nothing."""
