"""`make train-demo`: its recipe runs, on any folder of text, and ends with a sample and how to serve the model."""

from __future__ import annotations

import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch

import dsv4

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def demo() -> Any:
    before = torch.get_num_threads()
    yield runpy.run_path(str(ROOT / "recipes" / "demo.py"))
    torch.set_num_threads(before)


def test_two_steps(demo: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.md").write_text("# A text\n\nSome words, and others; the end.\n" * 200)
    run = tmp_path / "run"
    assert demo["main"]([str(tmp_path / "texts"), "--steps", "2", "--run-dir", str(run), "--prompt", "Some"]) == 0
    printed = capsys.readouterr().out
    assert "2/2  loss" in printed and "\n\nSome" in printed
    assert f"dsv4 serve {run / 'model'}" in printed
    assert "quantized_share = 0.15\n" in (run / "recipe.toml").read_text()  # it is served in FP4
    assert dsv4.load(run / "model").config.hidden_size == demo["SIZES"]["hidden_size"]


def test_it_never_takes_the_folder_of_another_run(demo: Any, tmp_path: Path) -> None:
    assert demo["free_folder"](tmp_path / "demo") == tmp_path / "demo"
    for name in ("demo", "demo-2"):
        (tmp_path / name).mkdir()
    assert demo["free_folder"](tmp_path / "demo") == tmp_path / "demo-3"


@pytest.mark.skipif(shutil.which("make") is None, reason="make is missing")
@pytest.mark.parametrize("steps", [2, pytest.param(None, marks=pytest.mark.slow)])
def test_make_trains_in_minutes_and_serves(steps: int | None, tmp_path: Path) -> None:
    """`make train-demo ARGS=--serve`, in an environment that counts as installed; steps: None for the demo's own."""
    for folder in ("venv/bin", "texts"):
        (tmp_path / folder).mkdir(parents=True)
    for page in ("model.md", "training.md", "data.md"):
        shutil.copy(ROOT / "docs" / page, tmp_path / "texts")
    program = tmp_path / "venv" / "bin" / "dsv4"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m dsv4 "$@"\n')
    program.chmod(0o755)
    for stamp in (".python", ".run", ".train"):  # each newer than what it is made from
        (tmp_path / "venv" / stamp).touch()
    arguments = f"--serve --run-dir {tmp_path}/run" + (f" --steps {steps}" if steps else "")
    reserved = socket.socket()  # it holds the port while the demo trains: no other process is given it meanwhile
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # but one that asks for it by number, as the demo
    reserved.bind(("127.0.0.1", 0))
    port = reserved.getsockname()[1]
    command = ["make", "train-demo", f"VENV={tmp_path}/venv", f"TEXT={tmp_path}/texts", f"PORT={port}"]
    made = subprocess.Popen(
        [*command, f"ARGS={arguments}"], cwd=ROOT, start_new_session=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        url, body = (
            f"http://127.0.0.1:{port}/v1/completions",
            {"model": "model", "prompt": "The model ", "max_tokens": 8, "ignore_eos": True},
        )
        while (answer := ask(url, body)) is None:
            assert made.poll() is None, made.communicate()[0]
            time.sleep(0.5)
        times = [process.cpu_times() for process in psutil.Process(made.pid).children(recursive=True)]
    finally:
        os.killpg(made.pid, signal.SIGTERM)
        printed = made.communicate(timeout=60)[0]
        reserved.close()
    assert answer["usage"]["completion_tokens"] == 8 and answer["choices"][0]["text"]
    assert f"{steps or 150}/{steps or 150}  loss" in printed and "trained in" in printed
    # One thread, so on a free core as much time passes: whatever else the machine does, the demo's own part is minutes.
    assert sum(found.user + found.system for found in times) < 300


def ask(url: str, body: dict[str, Any]) -> Any:
    """Answer of a server, None if none listens yet or it is still loading."""
    try:
        answer = httpx.post(url, json=body, timeout=60)
    except httpx.ConnectError:
        return None
    return None if answer.status_code == 503 else answer.raise_for_status().json()
