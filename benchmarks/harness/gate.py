"""No number without agreement: the frozen tests are green, and both contenders give the same logits."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from benchmarks.harness.process import ROOT, BenchmarkError, WorkerProcess

TESTS = ("tests/model/test_chunking.py", "tests/model/test_against_transformers.py")
TOLERANCE = 1e-4  # largest difference of logits over the largest logit, fp32 against fp32


def run_tests(tests: tuple[str, ...] = TESTS, root: Path = ROOT) -> None:
    """BenchmarkError with the tail of the output unless every one of the frozen tests passes."""
    missing = [test for test in tests if not (root / test).exists()]
    if missing:
        raise BenchmarkError(f"{', '.join(missing)}: not there, so nothing vouches for the model (--no-gate goes on)")
    if find_spec("pytest") is None:
        raise BenchmarkError("pytest is missing: pip install '.[test]' for the tests that come first, or --no-gate")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        raise BenchmarkError(f"the frozen tests are red, so there are no numbers:\n{tail}")


def deviation(left: np.ndarray, right: np.ndarray) -> float:
    """Largest |left - right| over the largest |right|; BenchmarkError past TOLERANCE or where one is not a number."""
    found = float(np.abs(left - right).max() / np.abs(right).max())
    if not found <= TOLERANCE:
        raise BenchmarkError(
            f"logits disagree: the largest difference is {found:.1e} of the largest logit, allowed {TOLERANCE:.0e}"
        )
    return found


def check_logits(workers: dict[str, WorkerProcess], vocab_size: int, prompt: int, steps: int, scratch: Path) -> float:
    """A prompt at once, then token by token, through both -> the deviation of their logits."""
    ids = np.random.default_rng(7).integers(vocab_size, size=prompt + steps).tolist()
    rows: list[np.ndarray] = []
    for peer, worker in workers.items():
        file = scratch / f"{peer}.npy"
        worker.ask("logits", ids=ids, prompt=prompt, file=str(file))
        rows.append(np.load(file))
    return deviation(*rows)
