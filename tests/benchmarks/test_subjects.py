"""Every benchmark is on the page of benchmarks with its command, its time and the page of its figures."""

from __future__ import annotations

import subprocess
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
    }
    assert {name.split()[0] for name in report.SUBJECTS} == files


def test_the_page_of_a_subject_names_its_command() -> None:
    text = report.others()
    for name, (time, _, page) in report.SUBJECTS.items():
        assert f"- `dsv4 bench {name}`, {time}: " in text
        assert f"dsv4 bench {name.split()[0]}" in (ROOT / "docs" / page).read_text(encoding="utf-8")


def test_help_of_every_benchmark_shows_its_flags_without_torch() -> None:
    """Torch alone takes longer to import than a help may take."""
    program = """
import contextlib, io, runpy, sys
from dsv4.commands.scripts import script_names
for name in script_names("benchmarks"):
    sys.argv, text = [name, "--help"], io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        runpy.run_path(f"benchmarks/{name}.py", run_name="__main__")
    assert f"dsv4 bench {name}" in text.getvalue() and "--" in text.getvalue(), name
    assert "torch" not in sys.modules, name
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=120)
