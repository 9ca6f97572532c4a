"""Provoke a loss spike in a tiny model and show the way out: detection, rollback, Anticipatory Routing, a sane end.

After --hurt-at steps the weights of one routed expert of every block are multiplied, an outlier as those that the
DeepSeek-V4 report ties to spikes; the saved states do not have it. The folder then holds metrics.jsonl, to be read.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dsv4.commands.recipe_flags import parse
from dsv4.config import ModelConfig
from dsv4.model.transformer import Transformer
from dsv4.training.loop import Stage, Trainer, TrainSettings
from dsv4.training.optim import MuonAdamW
from dsv4.training.plan import FixedPlan
from dsv4.training.schedule import Schedule
from dsv4.training.spikes import SpikeSettings
from dsv4.training.stability_settings import StabilitySettings

VOCAB = 50
HURT_EXPERT = 0
ANTICIPATE_STEPS = 10
CONFIG = replace(
    ModelConfig.preset("nano"), vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, num_hash_layers=1,
    num_attention_heads=2, head_dim=64, q_lora_rank=16, o_groups=2, o_lora_rank=16, index_n_heads=2, index_topk=8,
    n_routed_experts=4, moe_intermediate_size=16, compress_ratios=(0, 4, 128, 0),
)  # fmt: skip


@dataclass
class Batch:
    documents: list[list[int]]
    loss_masks: list[list[int]]


class Counting:
    """Documents that count in steps of 1 to 3 from a random number on."""

    def batch(self, step: int, /) -> Batch:
        generator = torch.Generator().manual_seed(step)
        draws = torch.randint(0, VOCAB, (6, 2), generator=generator).tolist()
        documents = [[(start + i * (1 + by % 3)) % VOCAB for i in range(24)] for start, by in draws]
        return Batch(documents, [[1] * len(document) for document in documents])


@dataclass(frozen=True)
class Outcome:
    """Records of a drill, in the order in which they were written."""

    lines: list[dict[str, Any]]

    @property
    def rollbacks(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if line.get("event") == "rollback"]

    @property
    def losses(self) -> dict[int, float]:
        """Loss by step, of the last attempt at each."""
        return {line["step"]: line["loss"] for line in self.lines if "loss" in line}

    @property
    def anticipatory(self) -> list[int]:
        """Steps with Anticipatory Routing, in the order in which they ran."""
        return [line["step"] for line in self.lines if line.get("anticipatory")]


def drill(run_dir: Path, steps: int, hurt_at: int, factor: float, delay: int, console: Console) -> Outcome:
    """Train `steps` steps with an expert damaged after `hurt_at`."""
    model = Transformer(CONFIG)
    model.init_weights(torch.Generator().manual_seed(1))
    stability = StabilitySettings(
        SpikeSettings(window=20, fewest=6, threshold=4.0),
        margin=5,
        recovered=10,
        anticipate_steps=ANTICIPATE_STEPS,
        delay=delay,
    )
    settings = TrainSettings(
        Schedule(peak=0.01, warmup_steps=5), quantized_share=0.0, save_every=5, count_clamps=True, stability=stability
    )
    optimizer = MuonAdamW(model, CONFIG, compute_dtype=torch.float32)
    stage = Stage("drill", 1.0, Counting())
    trainer = Trainer(model, optimizer, [stage], settings, FixedPlan(steps), run_dir, console, quiet=True)
    trainer.run(stop_after=hurt_at)
    console.print(f"step {hurt_at}: expert {HURT_EXPERT} of every layer times {factor:g}", highlight=False)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".ffn.experts." in name:
                weight[HURT_EXPERT] *= factor
    trainer.run()
    return Outcome([json.loads(line) for line in (run_dir / "metrics.jsonl").read_text("utf-8").splitlines()])


def main(arguments: list[str] | None = None) -> int:
    """Run the drill and say what happened; 1 if the run did not get out of the spike."""
    options = parse("spike_drill", arguments)
    if options.run_dir.exists():
        raise SystemExit(f"--run-dir: {options.run_dir} exists; give a new folder")
    console = Console()
    outcome = drill(options.run_dir, options.steps, options.hurt_at, options.factor, options.delay, console)
    for event in outcome.rollbacks:
        console.print(
            f"spike at step {event['step']}: {event['statistic']} {event['value']:.3f}, limit {event['limit']:.3f}; "
            f"back to step {event['to']}",
            highlight=False,
        )
    if on := outcome.anticipatory:
        console.print(f"Anticipatory Routing from step {on[0]} to {on[-1]}", highlight=False)
    losses = outcome.losses
    before, last = losses[options.hurt_at - 1], losses[options.steps - 1]
    console.print(f"loss before the damage {before:.3f}, at the end {last:.3f}", highlight=False)
    return 0 if outcome.rollbacks and last < before else 1


if __name__ == "__main__":
    sys.exit(main())
