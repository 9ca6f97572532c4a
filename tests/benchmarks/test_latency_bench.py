"""`dsv4 bench latency` runs at small sizes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks/ belongs to the checkout, not to the installed package

from benchmarks import latency


def test_every_wait_has_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("SHORT_PROMPTS", 2), ("SECONDS_APART", 0.01), ("ANSWER_TOKENS", 2)):
        monkeypatch.setattr(latency, name, value)
    assert latency.main(["--megabytes", "0.02", "--long", "300", "--steps", "128"]) == 0
    figures = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    assert list(figures) == [
        "0.02 MB tokenized",
        "long prompt of 300 tokens alone",
        "long prompt of 300 tokens in company",
        "long prompt of 300 tokens alone, 128 tokens per step",
        "0.02 MB, longest pause of the event loop",
        "0.02 MB, slowest of short texts",
        "short prompts, first token",
        "short prompts, last token",
    ]
    assert all(float(figure.split(" s")[0]) >= 0 for figure in figures.values())
    assert "(median of 2, " in figures["short prompts, first token"]
