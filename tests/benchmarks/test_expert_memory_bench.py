"""`dsv4 bench expert_memory` runs on a tiny model, with the same bits at every budget."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks/ belongs to the checkout, not to the installed package

from benchmarks import expert_memory
from dsv4.kernels import backends


@pytest.mark.skipif(sys.platform != "linux" or backends.native_module() is None, reason="needs Linux and the kernels")
def test_every_budget_has_a_row_and_the_same_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(tmp_path / "model"), "--quick", "--prompt", "9", "--steps", "8", "--threads", "1"]
    assert expert_memory.main([*arguments, "--shares", "0.5"]) == 0
    disk, unlimited, limited, bits = capsys.readouterr().out.splitlines()
    assert "the disk reads" in disk and unlimited.startswith("no limit ") and " tok/s" in unlimited
    assert limited.startswith("50% of experts ") and "MB/token" in limited and bits == "the same bits in all"
