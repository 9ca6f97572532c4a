"""Models without an optional part (MTP, CSA, score routing, ...) train too."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv4.kernels.precision import Precision
from dsv4.training.loop import Stage, Trainer, TrainSettings
from dsv4.training.losses import LossWeights
from dsv4.training.plan import FixedPlan
from dsv4.training.schedule import Schedule

from .tiny_training import Rows, draw_documents, make_model


class Counting:
    """Batches of documents that count up; the last document is a single token, without a target."""

    def batch(self, step: int, /) -> Rows:
        return Rows(draw_documents(step, 140, 5, 1))


WITHOUT: dict[str, dict[str, Any]] = {
    "MTP": {"num_nextn_predict_layers": 0, "compress_ratios": (0, 4, 128)},
    "compression": {"compress_ratios": (0, 0, 0, 0)},
    "compression and MTP": {"num_nextn_predict_layers": 0, "compress_ratios": (0, 0, 0)},
    "CSA": {"compress_ratios": (0, 128, 128, 0)},
    "HCA": {"compress_ratios": (0, 4, 4, 0)},
    "hash layers": {"num_hash_layers": 0},
    "score-routed layers": {"num_hash_layers": 3},
    "routers and MTP": {
        "num_hash_layers": 3,
        "num_nextn_predict_layers": 0,
        "compress_ratios": (0, 0, 0),
    },
    "nothing": {},
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("part", WITHOUT)
def test_a_model_without_a_part_takes_two_finite_steps(part: str, precision: Precision, tmp_path: Path) -> None:
    model, optimizer = make_model(**WITHOUT[part])
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    settings = TrainSettings(
        Schedule(peak=0.02, warmup_steps=1), quantized_share=0.5, precision=precision, micro_batches=2,
        loss_weights=LossWeights(balance=0.01),
    )  # fmt: skip
    plan = FixedPlan(2)
    trainer = Trainer(model, optimizer, [Stage("only", 1.0, Counting())], settings, plan, tmp_path, quiet=True)
    trainer.run()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    config = model.config
    for line in lines:
        assert all(math.isfinite(line[name]) for name in ("loss", "mtp_loss", "balance_loss", "indexer_loss"))
        assert (line["mtp_loss"] > 0) == bool(config.num_nextn_predict_layers)
        assert (line["indexer_loss"] > 0) == (4 in config.compress_ratios)
        assert (line["balance_loss"] > 0) == (part != "routers and MTP")
    moved = [name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])]
    assert {name for name in before if ".experts." not in name} <= set(moved)


@pytest.mark.parametrize("weights", [(0.0, 0.1), (0.3, 0.0)])
def test_an_mtp_block_without_a_loss_stays_as_it_is(weights: tuple[float, float], tmp_path: Path) -> None:
    """From the first step on, or in the decay: its momentum alone would go on moving it."""
    model, optimizer = make_model()
    settings = TrainSettings(
        Schedule(0.02, 1, decay_fraction=0.5), loss_weights=LossWeights(mtp=weights[0]), mtp_weight_in_decay=weights[1]
    )
    trainer = Trainer(
        model, optimizer, [Stage("only", 1.0, Counting())], settings, FixedPlan(4), tmp_path, quiet=True
    )  # fmt: skip
    begun = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.run(2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.run()
    stays = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert {name for name in begun if name.startswith("mtp.")} == {name for name in stays if "layers." not in name}
    moved = {name for name in begun if name.startswith("mtp.") and not torch.equal(begun[name], before[name])}
    assert bool(moved) == bool(weights[0])


def test_an_mtp_weight_of_zero_stays_zero_in_the_decay(tmp_path: Path) -> None:
    model, optimizer = make_model()
    settings = TrainSettings(Schedule(0.02, 1, decay_fraction=1.0), loss_weights=LossWeights(mtp=0.0))
    plan = FixedPlan(1)
    Trainer(model, optimizer, [Stage("only", 1.0, Counting())], settings, plan, tmp_path, quiet=True).run()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["mtp_loss"] == 0.0
