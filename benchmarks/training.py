"""`dsv4 bench training`: tokens per second of the nano recipe, forward and backward in fp32 and in bfloat16.

Both formats train from the same weights on the same batches, in turns of some steps. The first step of a turn starts
processes and is not counted.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median

from rich.console import Console

from benchmarks.harness.turns import at_least_one, in_turns, line
from dsv4.kernels.precision import Precision
from dsv4.training.loop import Trainer
from recipes.nano import DEFAULTS, ROOT, Run, fast_muon_dtype, make_trainer

FORMATS: tuple[Precision, ...] = ("fp32", "bf16")
LONG = 1_000_000  # total steps: the benchmark never reaches the decay and the quantized part


def make(options: argparse.Namespace, precision: Precision, run_dir: Path) -> Trainer:
    """The recipe's trainer in one number format."""
    device = "cpu" if options.budget == "cpu" else "cuda"
    tokens = options.tokens_per_batch or int(DEFAULTS[options.budget]["tokens_per_batch"])
    run = Run(
        options.budget, None, LONG, tokens, 3e-3, seed=1, replicas=options.replicas,
        device=device, muon_dtype=fast_muon_dtype(device), precision=precision,
    )  # fmt: skip
    trainer = make_trainer(run, ROOT / "models" / "nano", run_dir, Console(quiet=True))
    trainer.quiet = True
    return trainer


def take(trainer: Trainer, steps: int, _: int) -> float:
    """Median tokens per second of `steps` steps, after one that is not counted."""
    trainer.run(stop_after=trainer.progress.step + 1 + steps)
    return median(step["tokens_per_second"] for step in metrics(trainer)[-steps:])


def metrics(trainer: Trainer) -> list[dict[str, float]]:
    return [json.loads(text) for text in (trainer.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="dsv4 bench training", description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--rounds", type=at_least_one, default=6, help="default: %(default)s")
    add("--steps", type=at_least_one, default=5, help="counted steps of each in a round; default: %(default)s")
    add("--replicas", type=at_least_one, default=2, help="default: %(default)s")
    add("--tokens-per-batch", type=at_least_one, help="instead of the budget's")
    add("--budget", choices=sorted(DEFAULTS), default="cpu", help="default: %(default)s")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        trainers = {name: make(options, name, Path(folder) / name) for name in FORMATS}
        takes = {name: partial(take, trainer, options.steps) for name, trainer in trainers.items()}
        rates = in_turns(takes, options.rounds)
        last = {name: metrics(trainer)[-1] for name, trainer in trainers.items()}
    for name in FORMATS:
        print(
            line(name, rates[name], "tokens/s"), f"loss of step {last[name]['step']} {last[name]['loss']:.4f}", sep=", "
        )
    print(f"bf16 over fp32: {median(rates['bf16']) / median(rates['fp32']):.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
