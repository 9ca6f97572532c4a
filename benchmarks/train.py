"""`dsv4 bench train`: training beside transformers, in turns: forward and backward, whole steps, memory, nano.

Floors are the operations of a step over the machine's product rates, by part.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from benchmarks.harness.program import add_options, new_parser, run_benchmark
from dsv4.analysis.activations import POLICIES, Recompute
from dsv4.commands.options import count

if TYPE_CHECKING:
    from rich.console import Console

SUBJECTS = {
    "slice": "120.9M parameters: forward and backward by shape, a whole step, peak memory, parts of a step",
    "nano": "nano's recipe, beside an older checkout's",
}
SHAPES = ((2, 512), (1, 2048), (1, 4096))
STEP, MICRO_BATCHES = (1, 2048), 8  # 16,384 tokens
CONTENDERS = ("dsv4", "dsv4 bf16", "transformers")
EPILOG = f"""subjects:
{chr(10).join(f"  {name:6} {about}" for name, about in SUBJECTS.items())}

examples:
  dsv4 bench train
  dsv4 bench train --busy --rounds 1 --shapes 2x512 --no-step --no-gate
  git worktree add before 719d903 && make -C before .venv/.test
  dsv4 bench train nano --corpus corpus --before before"""


def run(options: argparse.Namespace, scratch: Path, console: Console) -> None:
    """Measure and record the subject of `options`."""
    from dataclasses import replace

    from benchmarks.harness import train_report
    from benchmarks.harness.process import BenchmarkError
    from benchmarks.harness.recording import record
    from benchmarks.harness.scenarios import SLICE, TINY
    from benchmarks.harness.train_rounds import NanoRounds, TrainRounds

    if options.subject == "nano":
        if options.corpus is None:
            raise BenchmarkError("nano needs --corpus: a folder that `dsv4 train corpus --out DIR` made")
        arguments = ["--corpus", str(options.corpus.absolute()), *shlex.split(options.recipe)]
        nano = NanoRounds(options.before, options.steps, options.rounds or 3, arguments)
        record({"train nano": nano.measure}, train_report.lines, options, console)
        return
    step = None if options.no_step else (STEP, MICRO_BATCHES)
    made = TrainRounds(
        config=SLICE,
        contenders=options.contenders,
        shapes=options.shapes,
        step=step,
        rounds=options.rounds or 3,
        threads=options.threads,
        busy=options.busy,
        scratch=scratch,
        recompute=cast(Recompute, options.recompute),
    )
    if options.quick:
        small = None if step is None else ((1, 24), 2)
        made = replace(made, config=TINY, shapes=((2, 16),), step=small, rounds=1, ceilings=(8, 256))
    record({"train slice": made.measure}, train_report.lines, options, console)


def _shape(text: str) -> tuple[int, int]:
    documents, _, tokens = text.partition("x")
    return count(documents), count(tokens)


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("train", "Measure training, beside transformers at the same weights and shapes.", EPILOG)
    add = parser.add_argument
    add("subject", nargs="?", choices=SUBJECTS, default="slice", metavar="SUBJECT", help="default: %(default)s")
    add("--shapes", nargs="+", type=_shape, default=SHAPES, metavar="DxT", help="default: 2x512 1x2048 1x4096")
    add("--no-step", action="store_true", help="leave the whole step of 16,384 tokens out")
    add("--contenders", nargs="+", choices=(*CONTENDERS, "dsv4 fp8"), default=CONTENDERS, metavar="NAME",
        help="dsv4, 'dsv4 bf16', 'dsv4 fp8', transformers; default: all but fp8")  # fmt: skip
    add("--busy", action="store_true", help="rates per processor second, for a machine that others use too")
    add("--recompute", choices=POLICIES, default="none", metavar="POLICY",
        help=f"activation checkpointing of ours: {', '.join(POLICIES)}; default: %(default)s")  # fmt: skip
    add("--before", type=Path, metavar="DIR", help="nano: a checkout of an older commit with its own .venv")
    add("--steps", type=count, default=8, metavar="N", help="nano: of a round; default: %(default)s")
    add("--corpus", type=Path, metavar="DIR", help="nano: a folder that `dsv4 train corpus` made")
    add("--recipe", default="--base-only data.scale=0.01", metavar="ARGS",
        help="nano: more for this checkout's recipe; default: %(default)s")  # fmt: skip
    add_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    return run_benchmark(parser, run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
