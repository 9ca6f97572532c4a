"""`dsv4 bench training`: tokens a second of the nano recipe, forward and backward in fp32 and in bfloat16.

The two train from the same weights on the same batches, some steps of one and then of the other: whatever else the
machine does, it does to both. The first step after each change starts processes and is not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from dsv4.training.loop import Trainer
from recipes.nano import DEFAULTS, ROOT, Run, fast_muon_dtype, make_trainer

FORMATS = ("float32", "bfloat16")
LONG = 1_000_000  # steps of a run that does not come to its decay and its quantized part


def make_trainers(options: argparse.Namespace, folder: Path) -> dict[str, Trainer]:
    """One trainer of the recipe for each number format."""
    device = "cpu" if options.budget == "cpu" else "cuda"
    run = Run(
        options.budget, None, LONG, options.tokens_per_batch or int(DEFAULTS[options.budget]["tokens_per_batch"]), 3e-3,
        seed=1, replicas=options.replicas, device=device, muon_dtype=fast_muon_dtype(device),
    )  # fmt: skip
    trainers = {}
    for name in FORMATS:
        values = {**vars(run), "compute_dtype": name}
        trainers[name] = make_trainer(Run(**values), options.tokenizer, folder / name, Console(quiet=True))
        trainers[name].quiet = True
    return trainers


def steps_of(trainer: Trainer, first: int) -> list[dict[str, float]]:
    """Metrics of the trainer's steps after `first`."""
    lines = (trainer.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [step for step in map(json.loads, lines) if step["step"] > first]


def measure(options: argparse.Namespace, folder: Path) -> dict[str, list[dict[str, float]]]:
    """Metrics of the counted steps, by number format."""
    trainers = make_trainers(options, folder)
    counted: dict[str, list[dict[str, float]]] = {name: [] for name in FORMATS}
    for _ in range(options.rounds):
        for name, trainer in trainers.items():
            first = trainer.progress.step
            trainer.run(stop_after=first + 1 + options.steps)
            counted[name] += steps_of(trainer, first)
    return counted


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="dsv4 bench training", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=6, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=5, help="counted steps of each in a round; default: %(default)s")
    parser.add_argument("--replicas", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--tokens-per-batch", type=int, help="instead of the budget's")
    parser.add_argument("--budget", choices=sorted(DEFAULTS), default="cpu", help="default: %(default)s")
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "models" / "nano", help="default: %(default)s")
    options = parser.parse_args(argv)
    for name in ("rounds", "steps", "replicas"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: at least 1")
    with tempfile.TemporaryDirectory() as folder:
        counted = measure(options, Path(folder))
    medians = {}
    for name, steps in counted.items():
        rates = sorted(step["tokens_per_second"] for step in steps)
        medians[name] = statistics.median(rates)
        print(
            f"{name}: {medians[name]:.0f} tokens/s (median of {len(rates)} steps, {rates[0]:.0f} to {rates[-1]:.0f}), "
            f"loss of step {steps[-1]['step']} {steps[-1]['loss']:.4f}"
        )
    print(f"bfloat16 over float32: {medians['bfloat16'] / medians['float32']:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
