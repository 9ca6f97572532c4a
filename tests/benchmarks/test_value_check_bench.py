"""`dsv4 bench value_check` runs on random weights that it writes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks/ belongs to the checkout, not to the installed package

from benchmarks import value_check
from benchmarks.harness.scenarios import TINY
from dsv4.analysis.inventory import LAYOUTS, StorageLayout


@pytest.mark.parametrize("layout", LAYOUTS)
def test_random_weights_of_every_layout_load(
    layout: StorageLayout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(value_check, "SHAPE", TINY)
    assert value_check.main([str(tmp_path / "model"), "--random", layout, "--rounds", "1"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert " weights; " in first
    assert [line.split(": ")[0] for line in lines] == ["reading", "check", "load", "load unchecked"]
