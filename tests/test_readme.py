"""The README is right: its Python and commands run, its make targets and the files of its map exist."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dsv4.cli import build_parser

from .readme_commands import arguments, blocks, commands

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = [text for language, text in blocks(README) if language == "python"]
COMMANDS = commands(README)
# Commands that wait for a user or take long: only their arguments are checked here.
NOT_RUN = ("serve", "chat", "train", "eval", "bench")


def run(*command: str, cwd: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_is_short_and_shows_python_and_commands() -> None:
    assert len(README.splitlines()) <= 120 and PYTHON and len(COMMANDS) >= 5


@pytest.mark.parametrize("code", PYTHON, ids=lambda code: code.split("\n")[0])
def test_the_python_example_runs(code: str, tmp_path: Path) -> None:
    run(sys.executable, "-W", "error", "-c", code, cwd=tmp_path)


def test_pictures_and_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses_and_most_run(command: str, tmp_path: Path) -> None:
    options = build_parser().parse_args(arguments(command))
    if options.command not in NOT_RUN:
        (tmp_path / "models").symlink_to(ROOT / "models")
        run(sys.executable, "-m", "dsv4", *arguments(command), cwd=tmp_path)


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for line in re.findall(r"(?:^|`)make ((?:[a-z]+ ?)+)", README, flags=re.M):
        for target in line.split():
            assert re.search(rf"^{target}:", makefile, flags=re.M), target


def test_the_map_names_existing_files() -> None:
    section = README.split("## Map")[1].split("## ")[0]
    named = set(re.findall(r"`((?:dsv4|models|recipes|benchmarks|tests|docs)/[\w./]*)`", section))
    for path in named:
        assert (ROOT / path).exists(), f"the README's map names {path}, which does not exist"
    packages = {f"dsv4/{path.parent.name}/" for path in (ROOT / "dsv4").glob("*/__init__.py")}
    assert packages <= named, f"the README's map leaves out {sorted(packages - named)}"
