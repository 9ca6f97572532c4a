"""Every benchmark is on the page of benchmarks with its command, its time and the page of its figures."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks/ belongs to the checkout, not to the installed package

from benchmarks import report  # noqa: E402


def test_every_subject_is_listed() -> None:
    files = {file.stem for file in (ROOT / "benchmarks").glob("*.py")} - {
        "__init__",
        "report",
        "engine",
        "serving",
        "train",
        "grpo",
        "lora",  # these two print, and record nothing
        "ranks",
    }
    assert {name.split()[0] for name in report.SUBJECTS} == files


def test_the_page_of_a_subject_names_its_command() -> None:
    text = report.others()
    for name, (time, _, page) in report.SUBJECTS.items():
        assert f"- `dsv4 bench {name}`, {time}: " in text
        assert f"`dsv4 bench {name.split()[0]}" in (ROOT / "docs" / page).read_text(encoding="utf-8")
