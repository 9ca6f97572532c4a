"""The files of examples/ run; clients run against a server started here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsv4.commands.recipe_flags import parse
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


SLURM = ROOT / "examples" / "pretrain.slurm"
BEGIN, OWN = (
    ["recipe.toml", "parallel.data=2", "optimizer.rate=1e-3", "--out", "models/a", "--workers=2"],
    "run.device=cuda",
)


@pytest.mark.parametrize(
    ("words", "restarts", "whole", "want"),
    [
        (BEGIN, 0, False, [OWN, *BEGIN]),
        (BEGIN, 1, False, [OWN, *BEGIN]),  # ended before there was a run
        (BEGIN, 1, True, ["--resume", "parallel.data=2", "--out", "models/a", "--workers=2"]),
        (["--resume"], 0, True, ["--resume"]),
        (["--resume", "parallel.data=4"], 2, True, ["--resume", "parallel.data=4"]),
    ],
)
def test_the_slurm_job_begins_and_resumes(
    words: list[str], restarts: int, whole: bool, want: list[str], tmp_path: Path
) -> None:
    """Under programs that stand in for SLURM's: the words that each rank gets, which its own parser takes."""
    (tmp_path / "scontrol").write_text("#!/bin/sh\nprintf 'node%s\\n' 1 2\n")
    (tmp_path / "srun").write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    for name in ("scontrol", "srun"):
        (tmp_path / name).chmod(0o755)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    if whole:
        (run_dir / "data.json").touch()
    job = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "7", "RUN_DIR": str(run_dir)}
    job |= {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", str(SLURM), *words], env=job | path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    launcher, arguments = said[: said.index("pretrain") + 1], said[said.index("pretrain") + 1 :]
    assert launcher[:5] == ["torchrun", "--nnodes", "2", "--nproc-per-node", "8"] and "node1:29500" in launcher
    assert arguments == [*want, "--run-dir", str(run_dir)]
    options = parse("pretrain", arguments)
    assert options.run_dir == run_dir and options.resume == ("--resume" in want)
