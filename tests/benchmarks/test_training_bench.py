"""`dsv4 bench training`: it runs, and both number formats see the same batches."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("reasoning_gym")

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks/ belongs to the checkout, not to the installed package

from benchmarks import training as bench  # noqa: E402


def test_quick_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--rounds", "1", "--steps", "1", "--replicas", "1", "--tokens-per-batch", "256"]) == 0
    plain, rounded, ratio = capsys.readouterr().out.splitlines()
    assert plain.startswith("float32: ") and rounded.startswith("bfloat16: ")
    assert ratio.startswith("bfloat16 over float32: ")
    losses = [float(line.rsplit(" ", 1)[1]) for line in (plain, rounded)]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


def test_senseless_numbers_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--rounds", "0"])
    assert "--rounds 0: at least 1" in capsys.readouterr().err
