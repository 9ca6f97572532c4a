"""`dsv4 bench gradients`: it runs, and its contenders compute one loss."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks/ belongs to the checkout, not to the installed package

from benchmarks import gradients as bench
from benchmarks.harness.random_checkpoint import write_random_values
from benchmarks.harness.scenarios import TINY


def test_contenders_take_turns(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--quick", "--rounds", "1", "--threads", "1", "--busy", "2x16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == [
        "2 x 16, dsv4", "2 x 16, dsv4 bf16", "2 x 16, transformers", "2 x 16, dsv4", "2 x 16, dsv4 bf16",
    ]  # fmt: skip
    assert all("tokens per processor second, peak" in line for line in lines[:3])
    assert all("times transformers' rate" in line for line in lines[3:])


def test_contenders_compute_the_same_next_token_loss(tmp_path: Path) -> None:
    write_random_values(TINY, tmp_path / "model", 1, "fp32")
    losses = []
    for name in bench.CONTENDERS:
        bench.load(name, tmp_path / "model")
        losses.append(bench.step(name, 2, 24, TINY.vocab_size, 3)[2])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("wrong", ["0x4", "4", "4x"])
def test_wrong_shapes_are_refused(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main([wrong])
    assert "at least 1" in capsys.readouterr().err
