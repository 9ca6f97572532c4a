"""One process per contender, so that memory, threads and environment are its own."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import ParamSpec, TypeVar

ROOT = Path(__file__).resolve().parents[2]
OURS = ("MKL_CBWR", "GOMP_SPINCOUNT")  # what `import dsv4` sets for itself, and what slows others down
P = ParamSpec("P")
R = TypeVar("R")


class BenchmarkError(RuntimeError):
    """The comparison is invalid: a contender died, the logits disagree, or tests fail."""


class Process:
    """A contender's process: `with Process("dsv4", 2) as process: process.call(function, *arguments)`."""

    def __init__(self, name: str, threads: int, limit_bytes: int | None = None) -> None:
        """limit_bytes: address space; larger allocations fail instead of starving the machine."""
        self.name = name
        self._pool = ProcessPoolExecutor(1, get_context("spawn"), start, (name, threads, limit_bytes))

    def call(self, function: Callable[P, R], *arguments: P.args, **named: P.kwargs) -> R:
        """Call a module-level `function` in the process; BenchmarkError if it fails or the process ends."""
        try:
            return self._pool.submit(_without_gradients, function, *arguments, **named).result()
        except Exception as error:
            asked = " ".join([function.__name__, *(str(value) for value in arguments if isinstance(value, str | Path))])
            how = "ended (out of memory?)" if isinstance(error, BrokenProcessPool) else "failed"
            raise BenchmarkError(f"{self.name} {how} in {asked!r}: {error}") from error

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()


def plain_environment() -> dict[str, str]:
    """This process's environment without OURS: a program that imports dsv4 sets them itself."""
    return {name: value for name, value in os.environ.items() if name not in OURS}


def start(name: str, threads: int, limit_bytes: int | None = None) -> None:
    """Prepare a new process before torch is imported."""
    import dsv4

    assert dsv4.__version__
    if not name.startswith("dsv4"):
        for variable in OURS:
            os.environ.pop(variable, None)
    # No network look-ups, no progress bars: weights are local.
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1")
    os.environ.update(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
    if limit_bytes is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
    import torch

    torch.set_num_threads(threads)


def peak_bytes(process: int | str = "self") -> int:
    """Peak memory of a process in bytes, 0 if the system does not tell.

    Linux's VmHWM; not ru_maxrss, which a child inherits from its parent.
    """
    return _status_bytes("VmHWM", process)


def own_bytes() -> int:
    """Anonymous memory of this process in bytes, 0 if the system does not tell."""
    return _status_bytes("RssAnon", "self")


def _status_bytes(field: str, process: int | str) -> int:
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text(), flags=re.M)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def _without_gradients(function: Callable[P, R], *arguments: P.args, **named: P.kwargs) -> R:
    import torch

    with torch.inference_mode():
        try:
            return function(*arguments, **named)
        except Exception as error:  # not every exception can be pickled
            raise BenchmarkError(f"{type(error).__name__}: {error}") from error
