"""`dsv4 bench distill`: distillation beside the sampled token, one mixed run and averaged weights."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness.program import new_folder, new_parser

if TYPE_CHECKING:
    from benchmarks.harness.distill_ways import Comparison

EPILOG = """examples:
  dsv4 bench distill --run-dir runs/ways
  dsv4 bench distill --tasks gcd chain_sum --conversations 4000 --steps 200 --run-dir runs/ways"""


def lines(found: Comparison) -> list[str]:
    """Markdown tables: right answers with Wilson 95 % intervals, and the noise of the gradients."""
    made = [f"| model | tokens | {' | '.join(found.tasks)} | mean |", "|---" * (len(found.tasks) + 3) + "|"]
    for name, correct in found.correct.items():
        cells = [_rate(correct[task], found.asked) for task in found.tasks]
        cells.append(_rate(sum(correct.values()), found.asked * len(found.tasks)))
        made.append(f"| {name} | {found.tokens.get(name, '')} | {' | '.join(cells)} |")
    made += ["", "| gradient | norm² of its mean | variance | variance / norm² |", "|---|---|---|---|"]
    for estimate, noise in found.noise.items():
        made.append(f"| {estimate} | {noise.signal:.3g} | {noise.variance:.3g} | {noise.ratio:.3g} |")
    return made


def _rate(correct: int, asked: int) -> str:
    from dsv4.evals.intervals import wilson

    low, high = wilson(correct, asked)
    return f"{100 * correct / asked:.0f} % ({100 * low:.0f}-{100 * high:.0f})"


def draw(found: Comparison, path: Path) -> bool:
    """Bars of the mean over tasks with their intervals; False without matplotlib."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        return False
    from dsv4.evals.intervals import wilson
    from dsv4.training.plots import new_figure

    figure = new_figure(9.0, 4.0)
    axes = figure.subplots()
    asked = found.asked * len(found.tasks)
    for place, (name, correct) in enumerate(found.correct.items()):
        right = sum(correct.values())
        low, high = wilson(right, asked)
        rate = right / asked
        axes.barh(place, rate, color=f"C{place}")
        axes.errorbar(rate, place, xerr=[[rate - low], [high - rate]], color="black", capsize=3)
        axes.text(0.0, place, f" {name}", va="center", fontsize=8)
    axes.set_yticks([])
    axes.set_xlim(0.0, 1.0)
    axes.set_xlabel(f"right answers, mean of {', '.join(found.tasks)}; Wilson 95 %")
    figure.savefig(path, dpi=130)
    return True


def parser() -> argparse.ArgumentParser:
    about = "Train specialists of two tasks from one model, make a student of them in four ways, and compare."
    made = new_parser("distill", about, EPILOG)
    add = made.add_argument
    add("--model", default="nano", help="folder of the model to start from; default: %(default)s")
    add("--tasks", nargs=2, default=["count_bits", "number_filtering"], metavar="TASK", help="default: %(default)s")
    add("--conversations", type=int, default=2000, metavar="N", help="of a specialist; default: %(default)s")
    add("--steps", type=int, default=60, metavar="N", help="of distillation; default: %(default)s")
    add("--prompts", type=int, default=32, metavar="N", help="of a step; default: %(default)s")
    add("--max-tokens", type=int, default=48, metavar="N", help="of an answer; default: %(default)s")
    add("--held-out", type=int, default=200, metavar="N", help="questions per task; default: %(default)s")
    add("--batches", type=int, default=8, metavar="N", help="for the gradient's variance; default: %(default)s")
    add("--sft-rate", type=float, default=5e-4, help="learning rate; default: %(default)s")
    add("--distill-rate", type=float, default=5e-4, help="learning rate; default: %(default)s")
    add("--row-tokens", type=int, default=2048, metavar="N", help="of a step of fine-tuning; default: %(default)s")
    add("--run-dir", type=new_folder, default="runs/distill_ways", help="a new folder; default: %(default)s")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    made = parser()
    options = made.parse_args(argv)
    from dataclasses import asdict, fields

    from benchmarks.harness.distill_ways import Sizes, compare

    sizes = Sizes(**{field.name: getattr(options, field.name) for field in fields(Sizes)})
    try:
        found = compare(options.model, options.tasks, sizes, options.run_dir)
    except ValueError as error:
        made.error(str(error))
    table = lines(found)
    (options.run_dir / "comparison.json").write_text(json.dumps(asdict(found), indent=1) + "\n", encoding="utf-8")
    (options.run_dir / "comparison.md").write_text("\n".join(table) + "\n", encoding="utf-8")
    draw(found, options.run_dir / "comparison.png")
    print("\n".join(table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
