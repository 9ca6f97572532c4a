"""`dsv4 bench speculation` runs at small sizes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks/ belongs to the checkout, not to the installed package

from benchmarks import speculation


def test_a_task_has_a_line_with_the_speed_of_every_length(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--tasks", "chain_sum", "--examples", "1", "--rounds", "1", "--max-tokens", "8", "--lengths", "2"]
    assert speculation.main([*arguments, "--temperatures", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:6] == ["task", "T", "tokens", "2", "0", "adaptive"]
    assert lines[1].startswith("chain_sum ") and len(lines) == 2
