"""Lines of a run on the terminal."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

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
