"""`make train-demo`: its recipe runs, on any folder of text, and ends with a sample and how to serve the model."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

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
    assert dsv4.load(run / "model").config.hidden_size == demo["SIZES"]["hidden_size"]


def test_it_never_takes_the_folder_of_another_run(demo: Any, tmp_path: Path) -> None:
    assert demo["free_folder"](tmp_path / "demo") == tmp_path / "demo"
    for name in ("demo", "demo-2"):
        (tmp_path / name).mkdir()
    assert demo["free_folder"](tmp_path / "demo") == tmp_path / "demo-3"


def test_make_runs_it() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert 'dsv4 train demo "$(TEXT)" $(ARGS)' in makefile and "TEXT ?= docs" in makefile
