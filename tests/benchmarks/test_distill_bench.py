"""`dsv4 bench distill` on a small random model: four ways, equal tokens, the noise of both gradients."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks import distill
from dsv4.config import nano_path
from dsv4.post_training.recipe_run import tokenizer_files
from dsv4.training.export import export_model
from tests.post_training.small_policy import small_policy

SHORT = "--conversations 4 --steps 1 --prompts 4 --max-tokens 6 --held-out 3 --batches 3 --row-tokens 256"


def test_it_compares_the_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export_model(small_policy()[0].model, tokenizer_files(nano_path(), tmp_path), tmp_path / "small")
    words = ["--model", str(tmp_path / "small"), *SHORT.split(), "--tasks", "gcd", "count_bits"]
    assert distill.main([*words, "--run-dir", str(tmp_path / "run")]) == 0
    found = json.loads((tmp_path / "run" / "comparison.json").read_text())
    ways = ("distilled, full vocabulary", "distilled, sampled token", "mixed fine-tuning", "averaged weights")
    assert list(found["correct"]) == ["start", "specialist gcd", "specialist count_bits", *ways]
    assert found["tokens"]["mixed fine-tuning"] == found["tokens"]["distilled, full vocabulary"] > 50
    assert found["noise"]["sampled"]["variance"] > found["noise"]["full"]["variance"]
    said = capsys.readouterr().out
    assert all(f"| {way} |" in said for way in ways)
    assert (tmp_path / "run" / "comparison.png").exists() == (find_spec("matplotlib") is not None)


def test_tasks_are_checked_before_anything_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for task in ("gdc", "spell_backward"):
        with pytest.raises(SystemExit):
            distill.main(["--tasks", task, "gcd", "--run-dir", str(tmp_path / "run")])
        assert f"task {task}; allowed: " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_stopped_training_ends_the_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipes.sft.main", lambda words: 143)
    export_model(small_policy()[0].model, tokenizer_files(nano_path(), tmp_path), tmp_path / "small")
    words = ["--model", str(tmp_path / "small"), *SHORT.split(), "--tasks", "gcd", "count_bits"]
    with pytest.raises(SystemExit) as stopped:
        distill.main([*words, "--run-dir", str(tmp_path / "run")])
    assert stopped.value.code == 143 and not (tmp_path / "run" / "comparison.json").exists()
