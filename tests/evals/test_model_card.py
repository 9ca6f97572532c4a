"""The model card has the measured scores, sizes and stages."""

from __future__ import annotations

import json
from pathlib import Path

from dsv4.config import ModelConfig
from dsv4.evals.model_card import write_model_card
from dsv4.evals.results import Score


def test_card_holds_scores_sizes_and_stages(tmp_path: Path) -> None:
    config = ModelConfig.preset("nano")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 2_500_000)
    steps = [
        {"stage": stage, "step": step, "loss": loss, "tokens": 1000 * (step + 1), "seconds": 36.0 * (step + 1)}
        for step, (stage, loss) in enumerate([("pretrain", 3.0), ("pretrain", 2.0), ("sft", 1.25)])
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in steps))
    scores = [Score("gcd", "reasoning", "thinking", 8, 6, 1, 80), Score("gcd", "reasoning", "non-thinking", 8, 2, 0, 8)]
    run = {"budget": "cpu", "tokens_per_batch": 512, "peak_lr": 0.003, "replicas": 2, "seed": 1}
    write_model_card(tmp_path, scores, run, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "| gcd | 75 % (41-93) | 25 % (7-59) | 10 |" in card
    assert "2.5 MB" in card
    assert "| pretrain | 2 | 2,000 | 0.02 | 2.5000 |" in card
    assert "| sft | 1 | 3,000 | 0.03 | 1.2500 |" in card
    assert "1 of 16 answers" in card
