"""The counter of the SwiGLU clamp: shares per layer, over micro-batches and replicas; no bit of training changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.kernels.swiglu import count_clamped
from dsv4.model import moe
from dsv4.training.loop import Stage, Trainer, TrainSettings
from dsv4.training.plan import FixedPlan
from dsv4.training.schedule import Schedule

from .tiny_training import Rows, draw_documents, make_model

LIMIT = 0.01  # small enough for a fresh model's values


class Documents:
    def batch(self, step: int, /) -> Rows:
        return Rows(draw_documents(step, 40, 9))


def train(folder: Path, **settings: Any) -> tuple[dict[str, Any], list[Tensor]]:
    """Metrics of the one step of a run, and the weights after it."""
    model, optimizer = make_model(swiglu_limit=LIMIT)
    made = TrainSettings(Schedule(peak=0.02, warmup_steps=1), **settings)
    Trainer(model, optimizer, [Stage("only", 1.0, Documents())], made, FixedPlan(1), folder, quiet=True).run()
    return json.loads((folder / "metrics.jsonl").read_text()), list(model.parameters())


def test_gates_count_above_and_ups_on_both_sides() -> None:
    gate, up = torch.tensor([[-20.0, 10.0, 11.0]]), torch.tensor([[-11.0, 12.0, 10.0]])
    assert count_clamped(gate, up, 10.0).tolist() == [1, 2, 6]


def test_shares_are_of_all_values_of_a_layer_and_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, weights = train(tmp_path / "off")
    assert "clamped" not in plain
    seen: list[tuple[int, int]] = []
    compute = moe.clamped_swiglu

    def watched(gate: Tensor, up: Tensor, limit: float, *rest: Tensor) -> Tensor:
        if torch.is_grad_enabled():  # not where the backward computes it again
            clamped = int((gate > limit).sum() + (up > limit).sum() + (up < -limit).sum())
            seen.append((clamped, gate.numel() + up.numel()))
        return compute(gate, up, limit, *rest)

    monkeypatch.setattr(moe, "clamped_swiglu", watched)
    counted, same = train(tmp_path / "on", count_clamps=True)
    assert all(torch.equal(a, b) for a, b in zip(weights, same, strict=True))
    # Routed and shared experts of three layers, one of them hash-routed, and of the MTP block.
    pairs = zip(seen[0::2], seen[1::2], strict=True)
    want = [(routed[0] + shared[0]) / (routed[1] + shared[1]) for routed, shared in pairs]
    assert list(counted["clamped"].items()) == list(
        zip(("layers.0.ffn", "layers.1.ffn", "layers.2.ffn", "mtp.0.ffn"), want, strict=True)
    )
    assert all(0.0 < share < 1.0 for share in want)


def test_replicas_and_micro_batches_add_up(tmp_path: Path) -> None:
    alone, _ = train(tmp_path / "alone", count_clamps=True, micro_batches=2)
    together, _ = train(tmp_path / "together", count_clamps=True, replicas=2)
    assert alone["clamped"] == together["clamped"]
