"""`dsv4 bench training`: it runs, and both number formats see the same batches."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("reasoning_gym")

sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks/ belongs to the checkout, not to the installed package

from benchmarks import training as bench
from benchmarks.harness.scenarios import NANO, TINY
from dsv4.data import generated
from recipes import nano


def test_both_formats_have_a_rate_and_nearly_one_loss(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = replace(TINY, vocab_size=NANO.vocab_size)
    monkeypatch.setattr(nano.ModelConfig, "preset", lambda name: small)
    monkeypatch.setattr(nano, "COUNTED_BATCHES", 2)
    monkeypatch.setattr(generated, "LENGTH_SAMPLES", 1)
    monkeypatch.setattr(generated, "sample_document", lambda rng: "It is prose. " * 20)  # the library is long to parse
    assert bench.main(["--rounds", "2", "--steps", "1", "--replicas", "1", "--tokens-per-batch", "256"]) == 0
    plain, rounded, ratio = capsys.readouterr().out.splitlines()
    assert plain.startswith("fp32: ") and rounded.startswith("bf16: ") and "(median of 2, " in plain
    assert ratio.startswith("bf16 over fp32: ")
    losses = [float(line.rsplit(" ", 1)[1]) for line in (plain, rounded)]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


def test_senseless_numbers_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--rounds", "0"])
    assert "argument --rounds: '0': at least 1" in capsys.readouterr().err
