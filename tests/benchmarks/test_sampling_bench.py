"""`dsv4 bench sampling` runs at small sizes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks/ belongs to the checkout, not to the installed package

from benchmarks import sampling


def test_every_draw_and_step_has_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sampling, "FLASH_VOCAB", 3001)
    assert sampling.main(["--rounds", "2", "--tokens", "9"]) == 0
    figures = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    draws = [f"a draw from {vocab} tokens{name}" for vocab in (8192, 3001) for name in sampling.FILTERS]
    assert list(figures) == [*draws, "a step, free", "a step under a JSON schema", "longer under the schema"]
    assert all("(median of 2, " in figure for figure in figures.values())
