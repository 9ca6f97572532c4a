"""The model card has the measured scores, sizes, stages, data and commands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dsv4.config import ModelConfig
from dsv4.evals.definitions import Choices
from dsv4.evals.model_card import describe_post_training, write_model_card
from dsv4.evals.nano_suite import SuiteReport
from dsv4.evals.needles import Cell
from dsv4.evals.post_training_results import Count, Effort, make_results, write_results
from dsv4.evals.results import Score
from dsv4.evals.results_card import write_card
from dsv4.training.nano_recipe import NanoRecipe
from dsv4.training.recipe import write_recipe


def test_card_holds_scores_sizes_stages_data_and_commands(tmp_path: Path) -> None:
    model, run, corpus = (tmp_path / name for name in ("model", "run", "corpus"))
    for folder in (model, run / "base", run / "sft", run / "data" / "shards" / "prose", corpus):
        folder.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps(ModelConfig.preset("nano").to_dict()))
    (model / "model.safetensors").write_bytes(b"\0" * 2_500_000)
    steps = [
        ("base", {"stage": "dense-512", "step": 0, "loss": 3.0, "tokens": 1000, "seconds": 36.0}),
        ("base", {"stage": "dense-512", "step": 1, "loss": 2.0, "tokens": 2000, "seconds": 72.0}),
        ("sft", {"stage": "sft", "step": 0, "loss": 1.25, "tokens": 3000, "seconds": 108.0}),
    ]
    for part in ("base", "sft"):
        lines = [json.dumps(step) + "\n" for name, step in steps if name == part]
        (run / part / "metrics.jsonl").write_text("".join(lines))
    (run / "base" / "losses.png").write_bytes(b"picture")
    (run / "base" / "held_out.jsonl").write_text('{"step": 2, "tokens": 2000, "bits_per_byte": {"faq": 1.5}}\n')
    (run / "data" / "shards" / "prose" / "index.json").write_text('{"counts": {"tokens": 1234567}}')
    package = {"name": "faq", "version": "1.2", "split": "validation", "bytes": 4321, "licences": ["GPL-2"]}
    (corpus / "card.json").write_text(json.dumps({"packages": [package]}))
    recipe = NanoRecipe.model_validate({"data": {"corpus": str(corpus)}})
    (run / "nano.toml").write_text(write_recipe(recipe))
    scores = [Score("gcd", "reasoning", "thinking", 8, 6, 1, 80), Score("gcd", "reasoning", "non-thinking", 8, 2, 0, 8)]
    suite = SuiteReport([], [Choices("never asked", 80, 40)], [], [Cell(1024, 0.5, 4, 3)])
    write_model_card(model, scores, run, suite)
    card = (model / "README.md").read_text()
    for line in (
        *("| gcd | 75 % (41-93) | 25 % (7-59) | 10 |", "2.5 MB", "1 of 16 answers", "| base | dense-512 | 2 | 2,000 |"),
        *(
            "0.02 | 2.5000 |",
            "| sft | sft | 1 | 3,000 | 0.03 | 1.2500 |",
            "| base | 2,000 | 1.500 |",
            "| prose | 1,234,567 |",
        ),
        *(
            "| faq | 1.2 | validation | 4,321 | GPL-2 |",
            "dsv4 train nano --corpus corpus",
            "| never asked | 80 | 50.0 %",
        ),
        *("| 1,024 | 75", "![base: losses](base-losses.png)"),
    ):
        assert line in card, line
    assert (model / "base-losses.png").read_bytes() == b"picture"
    assert "## Post-training" not in card

    student = tmp_path / "student"  # trained from that model: the card of one is the source of the other's
    student.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(model / name, student / name)
    write_model_card(student, scores, model / "README.md", suite)
    own = card.replace("--card runs/nano", "--card README.md").replace("--ledger runs/nano", "--ledger runs/v4")
    assert (student / "README.md").read_text() == own
    assert (student / "base-losses.png").read_bytes() == b"picture"
    with pytest.raises(ValueError, match="has no section Training"):
        write_model_card(student, scores, run / "nano.toml", suite)


def test_card_of_a_student_has_the_results_of_its_run(tmp_path: Path) -> None:
    """Both cards: that of `dsv4 train v4`, and the section of nano's."""
    names = ("base", "sft", "specialists.code", "student", "averaged", "mixed")
    scores = {name: {"code": Count(correct=8 if name == "sft" else 60, asked=80)} for name in names}
    results = make_results(scores, {"low": Effort(accuracy=0.5, tokens=20.25)}, None)
    write_results(results, tmp_path / "results.json")
    card = write_card(
        ModelConfig.preset("nano"), results, "dsv4 train v4 --run-dir runs/v4", ["seed 1", "dsv4 0.1.0, on a machine"]
    )
    for text in (card, describe_post_training(tmp_path)):
        assert "- reached: specialist of code minus sft: +5" in text and "- **missed**: largest difference" in text
        assert "| sft | 10.0 % (5-19), 8 of 80 |" in text and "| low | 50.0 % | 20.2 | - | - |" in text
    (tmp_path / "README.md").write_text(card)
    assert describe_post_training(tmp_path).endswith("\n" + card[card.index("## Recipe") :] + "\n")
    assert "Made with seed 1; dsv4 0.1.0, on a machine." in card
    assert "dsv4 train v4 --run-dir runs/v4\n" in card and card.startswith("---\nlicense: mit\n")
