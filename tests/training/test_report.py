"""Lines of a run on the terminal."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dsv4.training.report import PACE_STEPS, PLAIN_LINE_EVERY, Pace, Report

LINE = {"stage": "dense", "lr": 1e-3, "tokens_per_second": 80.0}


def shown(path: Path, **figures: Any) -> str:
    """The plain line of a run's first step that has one."""
    console = Console(file=io.StringIO(), width=200)
    with Report(path, 0, console) as report:
        for step in range(PLAIN_LINE_EVERY):
            report.step(LINE | {"step": step, "seconds": 2.0 * step} | figures, 100, planned=True)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().strip()


def test_what_a_step_did_not_measure_is_not_shown(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rest = "lr 1.00e-03  80 tok/s  left 2:40"
    assert shown(path, loss=1.0, accuracy=0.5) == f"dense 20/100  loss 1.000  acc 0.500  {rest}"
    assert shown(path, loss=1.0) == f"dense 20/100  loss 1.000  {rest}"
    assert shown(path) == f"dense 20/100  {rest}"


# Of steps of GRPO, of distillation, and of pre-training and adapters.
STEPS = {
    "grpo": {
        "loss": 0.0123, "accuracy": 0.4375, "reward": 0.51234, "kl": 0.00123, "train_serve_difference": 0.0,
        "lr": 1e-4, "tokens_per_second": 1234.5, "peak_memory_bytes": 1_700_000_000, "grad_norm": 1.0,
    },
    "distill": {
        "loss": 0.0123, "kl": 0.456, "train_serve_difference": 1.2e-5, "lr": 1e-4, "tokens_per_second": 123.4,
        "peak_memory_bytes": 141_000_000_000,
    },
    "sparse-4096": {
        "loss": 10.0123, "accuracy": 0.4375, "lr": 1e-4, "tokens_per_second": 12345.6, "mfu": 0.3512,
        "peak_memory_bytes": 2_000_000_000,
    },
}  # fmt: skip
PARTS = {
    "grpo": ["reward 0.512", "kl 0.001", "train-serve 0", "1.7 GB", "left 0:"],
    "distill": ["kl 0.456", "train-serve 1e-05", "141.0 GB", "left 0:"],
    "sparse-4096": ["loss 10.012", "12346 tok/s", "MFU 35.1%", "2.0 GB", "left 0:"],
}


@pytest.mark.parametrize("stage", STEPS)
def test_a_line_has_the_figures_of_its_kind_of_run_within_80_columns(stage: str, tmp_path: Path) -> None:
    out = io.StringIO()
    with Report(tmp_path / "metrics.jsonl", 0, Console(file=out, width=80, force_terminal=True)) as report:
        for step in range(2):
            report.step({"stage": stage, "step": step, "seconds": 2.0 * step} | STEPS[stage], 12, planned=True)
    lines = [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line) for line in re.split(r"[\r\n]+", out.getvalue())]
    last = [line for line in lines if line][-1]
    assert last.startswith(stage) and " 2/12 " in last and "…" not in last and len(last.rstrip()) <= 80, last
    assert all(part in last for part in PARTS[stage]), last


def test_a_log_has_whole_lines_whatever_the_width(tmp_path: Path) -> None:
    out = io.StringIO()
    with Report(tmp_path / "metrics.jsonl", 0, Console(file=out, width=40)) as report:
        report.step({"stage": "grpo", "step": 0, "seconds": 2.0} | STEPS["grpo"], 1, planned=True)
    assert out.getvalue() == (
        "grpo 1/1  loss 0.012  acc 0.438  reward 0.512  kl 0.001  train-serve 0  lr 1.00e-04  1234 tok/s  1.7 GB  "
        "left 0:00\n"
    )


def test_the_time_left_is_of_the_last_steps(tmp_path: Path) -> None:
    pace = Pace()
    assert pace.time_left(5, 5000.0, 1000) == "?", "what an earlier process took says nothing"
    assert pace.time_left(6, 5002.0, 1000) == "33:08"
    for step in range(7, 8 + PACE_STEPS):
        left = pace.time_left(step, 5002.0 + 100.0 * (step - 6), 1000)
    assert left == "26:11:40", "a busier hour counts until it is past"
    for step in range(8 + PACE_STEPS, 9 + 2 * PACE_STEPS):
        left = pace.time_left(step, 20000.0 + step, 1000)
    assert left == "14:52"
    assert pace.time_left(90, 30000.0, 1000) == "?", "the run went back to an earlier step"
    assert Pace().time_left(10, 7.0, 10) == "0:00"
