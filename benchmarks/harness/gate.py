"""Conditions of a benchmark: the frozen tests pass, and both contenders give the same logits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks.harness.process import ROOT, BenchmarkError

TESTS = ("tests/model/test_chunking.py", "tests/model/test_against_transformers.py")
TOLERANCE = 1e-4  # largest difference of logits over the largest logit, fp32 against fp32


def run_tests(tests: tuple[str, ...] = TESTS, root: Path = ROOT) -> None:
    """BenchmarkError with the tail of pytest's output unless all frozen tests exist and pass."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        raise BenchmarkError(f"the frozen tests are red, so there are no numbers (--no-gate goes on):\n{tail}")


def deviation(left: np.ndarray, right: np.ndarray) -> float:
    """Largest |left - right| / largest |right|; BenchmarkError if it exceeds TOLERANCE or is NaN."""
    found = float(np.abs(left - right).max() / np.abs(right).max())
    if not found <= TOLERANCE:
        raise BenchmarkError(
            f"logits disagree: the largest difference is {found:.1e} of the largest logit, allowed {TOLERANCE:.0e}"
        )
    return found
