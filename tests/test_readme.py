"""What the README shows, runs: its Python, its commands, its make targets and its map."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsv4.cli import build_parser
from dsv4.kernels import native

from .readme_commands import arguments, blocks, commands

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = [text for language, text in blocks(README) if language == "python"]
COMMANDS = commands(README)
URL = "http://127.0.0.1:8000"
# Commands that wait for a user or take long; their arguments are checked, their packages have their own tests.
NOT_RUN = ("serve", "chat", "train", "eval", "bench")


def run(*command: str, cwd: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """`dsv4 serve` on a free port -> its address, as it prints it."""
    command = [sys.executable, "-m", "dsv4", "serve", "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            printed = (re.search(r"http://[\d.]+:\d+", line) for line in process.stdout)
            address = next((found[0] for found in printed if found), None)
            assert address, "dsv4 serve printed no address"
            yield address
        finally:
            process.terminate()


def test_there_are_examples() -> None:
    assert len(PYTHON) >= 4 and len(COMMANDS) >= 5


@pytest.mark.parametrize("code", [code for code in PYTHON if URL not in code], ids=lambda code: code.split("\n")[0])
def test_python(code: str, tmp_path: Path) -> None:
    if "the same bits" in code and native.module() is None and not os.environ.get("MKL_CBWR", "").endswith("STRICT"):
        pytest.skip("the reference without MKL's strict mode agrees to rounding only")
    run(sys.executable, "-W", "error", "-c", code, cwd=tmp_path)


@pytest.mark.parametrize("code", [code for code in PYTHON if URL in code], ids=lambda code: code.split("\n")[0])
def test_python_against_the_server(code: str, server: str, tmp_path: Path) -> None:
    assert run(sys.executable, "-c", code.replace(URL, server), cwd=tmp_path).strip()


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str, tmp_path: Path) -> None:
    options = build_parser().parse_args(arguments(command))
    if options.command not in NOT_RUN:
        (tmp_path / "models").symlink_to(ROOT / "models")
        run(sys.executable, "-m", "dsv4", *arguments(command), cwd=tmp_path)


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for line in re.findall(r"(?:^|`)make ((?:[a-z]+ ?)+)", README, flags=re.M):
        for target in line.split():
            assert re.search(rf"^{target}:", makefile, flags=re.M), target


def test_the_map_names_what_exists() -> None:
    section = README.split("## Map")[1].split("## ")[0]
    named = set(re.findall(r"`((?:dsv4|models|recipes|benchmarks|tests|docs)/[\w./]*)`", section))
    for path in named:
        assert (ROOT / path).exists(), f"the README's map names {path}, which does not exist"
    packages = {f"dsv4/{path.parent.name}/" for path in (ROOT / "dsv4").glob("*/__init__.py")}
    assert packages <= named, f"the README's map leaves out {sorted(packages - named)}"
