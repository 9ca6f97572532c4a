"""`dsv4 bench disk_cache` runs at a small size."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks/ belongs to the checkout, not to the installed package

from benchmarks import disk_cache  # noqa: E402


def test_it_prints_a_row_per_policy(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(disk_cache, "POLICIES", ("full",))
    assert disk_cache.main(["--tokens", "300"]) == 0
    row = capsys.readouterr().out.splitlines()[-1].split("|")
    assert row[1].strip() == "`full`" and row[6].strip() == "299"
