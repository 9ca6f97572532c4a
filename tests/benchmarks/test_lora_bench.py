"""`dsv4 bench lora`: its contenders run, and adapters take less to train and to save."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks/ belongs to the checkout, not to the installed package

from benchmarks import lora as bench
from benchmarks.harness.random_checkpoint import write_random_checkpoint
from benchmarks.harness.scenarios import TINY


def test_contenders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write_random_checkpoint(TINY, tmp_path / "model", 1)
    threads = torch.get_num_threads()
    in_process: Any = lambda name, options, folder, found, _: (  # noqa: E731
        found.append(bench.measure(name, tmp_path / "model", options.tokens, options.rank, options.steps))
    )
    monkeypatch.setattr(bench, "take", in_process)
    try:
        assert bench.main(["--tokens", "16", "--steps", "1", "--rounds", "1", "--rank", "1"]) == 0
    finally:
        torch.set_num_threads(threads)
    lines = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    assert [key.split(", ")[0] for key in lines] == ["speed"] * 3 + ["memory"] * 3 + ["saved"] * 3
    saved = {key: float(value.split()[0]) for key, value in lines.items() if key.startswith("saved")}
    assert saved["saved, lora"] == saved["saved, lora, widened base"] < saved["saved, full"]
