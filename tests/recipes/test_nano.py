"""Two steps of the nano recipe, from scratch to a model folder that loads."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch

import dsv4

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "nano.py"


@pytest.fixture
def recipe(monkeypatch):
    """The recipe's main, with a tokenizer trained on very little text."""
    monkeypatch.setattr("dsv4.data.nano_tokenizer.nano_corpus", lambda: iter(["some words, and some more words"] * 9))
    return runpy.run_path(str(RECIPE))["main"]


def test_two_steps_give_a_model_folder(recipe, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "models" / "nano"
    common = ["--run-dir", str(run), "--out", str(out)]
    assert recipe(["--steps", "2", "--tokens-per-batch", "256", "--replicas", "1", *common]) == 0
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in metrics] == [0, 1]
    model = dsv4.load(out)
    logits = model(torch.tensor([[0, 5, 6]]))
    assert logits.shape == (1, 3, model.config.vocab_size)
    assert bool(logits.isfinite().all())
    assert dsv4.Tokenizer.from_pretrained(out).vocab_size == model.config.vocab_size
    assert sum(file.stat().st_size for file in out.iterdir()) <= 25e6

    with pytest.raises(SystemExit, match="already holds a run"):
        recipe(["--steps", "2", *common])
    before = (out / "config.json").stat().st_mtime_ns
    assert recipe(["--resume", *common]) == 0  # nothing left to train: the folder is written again
    assert (out / "config.json").stat().st_mtime_ns > before


def test_two_steps_in_bfloat16_with_replicas(recipe, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "nano"
    options = ["--steps", "2", "--tokens-per-batch", "512", "--replicas", "2", "--precision", "bf16"]
    assert recipe([*options, "--run-dir", str(run), "--out", str(out)]) == 0
    assert json.loads((run / "run.json").read_text())["precision"] == "bf16"
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("content", ["", '{"budget": "cpu"', '{"budget": "cpu", "unknown": 1}'])
def test_a_damaged_run_file_is_refused_with_its_path(recipe, tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(SystemExit, match=r"run\.json is damaged or of another version"):
        recipe(["--resume", "--run-dir", str(tmp_path), "--out", str(tmp_path / "out")])


def test_a_damaged_state_ends_the_command_in_words(recipe, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    common = ["--run-dir", str(run), "--out", str(out)]
    assert recipe(["--steps", "1", "--tokens-per-batch", "256", "--replicas", "1", *common]) == 0
    (run / "state.pt").write_bytes(b"half")
    with pytest.raises(SystemExit, match=r"training stopped: .*state\.pt is damaged"):
        recipe(["--resume", *common])


def test_resuming_nothing_is_refused(recipe, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="holds no run"):
        recipe(["--resume", "--run-dir", str(tmp_path / "none"), "--out", str(tmp_path / "out")])


def test_a_folder_that_is_no_model_is_not_written_over(recipe, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    run = tmp_path / "run"
    for out in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(SystemExit, match="holds something else than a model"):
            recipe(["--steps", "2", "--run-dir", str(run), "--out", str(out)])
    assert (tmp_path / "notes.txt").read_text() == "mine" and not run.exists()
