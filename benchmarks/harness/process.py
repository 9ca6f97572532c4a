"""The parent's end of a worker process: start in a clean environment, ask, wait for the answer, end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[2]


class BenchmarkError(RuntimeError):
    """The comparison cannot stand: a contender died, the logits disagree, the tests are red."""


def worker_environment(peer: str, threads: int) -> dict[str, str]:
    """The environment of a contender. dsv4's MKL mode, set in this process by importing dsv4, stays with dsv4."""
    environment = dict(os.environ)
    if peer != "dsv4":
        environment.pop("MKL_CBWR", None)
    count = str(threads)
    environment.update(OMP_NUM_THREADS=count, MKL_NUM_THREADS=count, PYTHONPATH=str(ROOT))
    # No look-ups, no bars: weights are local.
    environment.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1")
    return environment


class WorkerProcess:
    """`with WorkerProcess("dsv4", 2) as worker: worker.ask("load", folder=...)`."""

    def __init__(self, peer: str, threads: int, limit_bytes: int | None = None) -> None:
        """limit_bytes: of addresses; allocations beyond fail instead of starving the machine."""
        self.peer = peer
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in __exit__, with the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.harness.worker", peer, str(threads), str(limit_bytes or "")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=ROOT,
            env=worker_environment(peer, threads),
        )

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """One request -> its answer. BenchmarkError when the process ends instead."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise BenchmarkError(self._epitaph(do))
        return json.loads(line)

    def _epitaph(self, do: str) -> str:
        status = self._process.wait()
        self._errors.seek(0)
        tail = "".join(self._errors.readlines()[-8:]).rstrip()
        reason = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        hint = " (out of memory?)" if status == -signal.SIGKILL else ""
        return f"{self.peer} {reason}{hint} during {do!r}" + (f":\n{tail}" if tail else "")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._process.kill()
        with self._errors, self._process:  # closes its pipes, on which it ends, and waits
            pass
