"""The files of examples/ run; clients run against a server started here."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsv4.kernels import backends

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
URL = "http://127.0.0.1:8000"
CLIENTS = [path for path in EXAMPLES if URL in path.read_text(encoding="utf-8")]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Start `dsv4 serve` on a free port -> its address, as it prints it."""
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


def run(code: str, folder: Path) -> str:
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_short() -> None:
    assert len(EXAMPLES) >= 5
    assert all(len(path.read_text(encoding="utf-8").splitlines()) <= 40 for path in EXAMPLES)


@pytest.mark.parametrize("path", [path for path in EXAMPLES if path not in CLIENTS], ids=lambda path: path.name)
def test_an_example_runs_and_prints(path: Path, tmp_path: Path) -> None:
    printed = run(path.read_text(encoding="utf-8"), tmp_path)
    assert printed.strip()
    if path.name == "logits.py" and backends.native_module() is not None:
        assert "the same bits: True" in printed
    if path.name == "train_tiny.py":
        losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", printed)]
        assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("path", CLIENTS, ids=lambda path: path.name)
def test_a_client_gets_its_answer(path: Path, server: str, tmp_path: Path) -> None:
    code = path.read_text(encoding="utf-8").replace(URL, server)
    assert "42" in run(code, tmp_path)
