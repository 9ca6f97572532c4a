"""Program of one rank in tests: trains the tiny model and writes its losses."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsv4.analysis.degrees import Degrees
from dsv4.model.transformer import Transformer
from dsv4.parallel.fsdp import local_part
from dsv4.parallel.mesh import process_group
from dsv4.training.attention_phase import AttentionPhase
from dsv4.training.loop import Stage, Trainer, TrainSettings
from dsv4.training.lora import add_adapters
from dsv4.training.lora_settings import LoraSettings
from dsv4.training.plan import FixedPlan
from dsv4.training.rank_loop import RankTrainer
from dsv4.training.schedule import Schedule
from dsv4.training.spikes import SpikeSettings
from dsv4.training.stability_settings import StabilitySettings
from dsv4.training.start import declare_model, drawn_values

from ..training.tiny_training import CONFIG, SEED, Rows, draw_documents, make_model

STEPS = 6


@dataclass
class UnevenBatches:
    """Batches whose documents differ in length and number; every fifth is too short for the indexer."""

    def batch(self, step: int, /) -> Rows:
        if step % 5 == 3:
            return Rows(draw_documents(step, 3, 2))
        return Rows(draw_documents(step, 131 - step, 6, 45 + step))


def settings(**changes: Any) -> TrainSettings:
    chosen: dict[str, Any] = {"quantized_share": 0.34, "save_every": 2} | changes
    if "stability" in chosen:
        spikes = SpikeSettings(window=8, fewest=3, patience=1)
        chosen["stability"] = StabilitySettings(spikes, margin=1, anticipate_steps=2) if chosen["stability"] else None
    return TrainSettings(Schedule(0.002, 2, 0.5, 0.1), **chosen)


def make_stages(phases: Sequence[AttentionPhase]) -> list[Stage]:
    """Stages of equal length, one per phase."""
    return [Stage(phase, 1.0 / len(phases), UnevenBatches(), phase) for phase in phases]


TARGETS = ("attention", "experts", "shared_experts", "head")


def make_start(lora: str | None, targets: Sequence[str] = TARGETS) -> tuple[Transformer, dict[str, Any]]:
    """Model and optimizer settings of a run; lora: optimizer of adapters, None: every parameter is trained."""
    model, _ = make_model()
    if lora is not None:
        add_adapters(model, LoraSettings(3, 6.0, tuple(targets)), torch.Generator().manual_seed(5))
    return model, {"compute_dtype": torch.float32, "adapters": lora or "adamw_no_decay"}


def hurt(trainer: Trainer | RankTrainer) -> None:
    """Multiply the head's weights, which no state on disk has."""
    local_part(trainer.model.head.weight).mul_(30.0)


def main(
    run_dir: Path,
    degrees: dict[str, int],
    micro_batches: int,
    stop_after: int | None,
    changes: dict[str, Any],
    phases: list[AttentionPhase],
    lora: str | None,
    hurt_at: int | None,
    targets: Sequence[str],
) -> None:
    """lora: optimizer of adapters; None: every parameter is trained. hurt_at: step before which weights are damaged."""
    torch.set_num_threads(1)
    with process_group(timeout=120):
        model, optimizer = make_start(lora, targets)
        # One process draws the same values for the whole model.
        values = drawn_values(CONFIG, torch.Generator().manual_seed(SEED)) if lora is None else None
        trainer = RankTrainer(
            model if values is None else declare_model(CONFIG), optimizer, make_stages(phases),
            settings(micro_batches=micro_batches, **changes), FixedPlan(STEPS), run_dir, Degrees(**degrees), quiet=True,
            values=values,
        )  # fmt: skip
        if hurt_at is not None:
            trainer.run(hurt_at)
            hurt(trainer)
        trainer.run(stop_after)
        if lora:
            pairs = trainer.gather_adapters().items()
            whole = {f"{name}.{part}": tensor for name, pair in pairs for part, tensor in zip("AB", pair, strict=True)}
        else:
            whole = dict(trainer.gather_tensors())
        if os.environ["RANK"] == "0":
            torch.save(whole, run_dir / "whole.pt")


if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    main(Path(options.pop("run_dir")), **options)
