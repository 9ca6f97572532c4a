"""`dsv4 bench grpo`: GRPO steps beside TRL's GRPOTrainer on nano, in turns: rollouts, updates, memory."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness.program import add_options, new_parser, run_benchmark
from dsv4.commands.options import count

if TYPE_CHECKING:
    from rich.console import Console

OURS = ("dsv4", "dsv4 adamw")
EPILOG = """examples:
  dsv4 bench grpo --trl "$(make trl | tail -n 1)"
  dsv4 bench grpo --busy --threads 1 --no-gate"""


def run(options: argparse.Namespace, scratch: Path, console: Console) -> None:
    """Measure and record."""
    from dataclasses import replace

    from benchmarks.harness import grpo_report
    from benchmarks.harness.grpo_rounds import CONTENDERS, GrpoRounds
    from benchmarks.harness.policy_trainers import Shape
    from benchmarks.harness.process import BenchmarkError
    from benchmarks.harness.recording import record

    shape = Shape(options.prompts, options.group, options.tokens, options.updates)
    if shape.answers % shape.updates:
        raise BenchmarkError(
            f"{shape.answers} answers in {shape.updates} updates; allowed: a divisor of {shape.answers}"
        )
    packages: Path | None = None
    if options.trl is not None:
        packages = next(options.trl.glob("lib/python*/site-packages"), None)
        if packages is None or not (packages / "trl").is_dir():
            raise BenchmarkError(f"{options.trl} is no environment with TRL; `make trl` makes one")
    made = GrpoRounds(
        contenders=CONTENDERS if packages else OURS,
        shape=shape,
        rounds=options.rounds or 3,
        threads=options.threads,
        busy=options.busy,
        scratch=scratch,
        packages=packages,
    )
    if options.quick:
        made = replace(made, shape=Shape(2, 2, 8, 2), rounds=1, ceilings=(8, 256))
    record({"grpo": made.measure}, grpo_report.lines, options, console)


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("grpo", "Measure steps of GRPO on nano, beside TRL's with the same model and prompts.", EPILOG)
    add = parser.add_argument
    add("--trl", type=Path, metavar="DIR", help="virtual environment with TRL, from `make trl`; default: dsv4 alone")
    add("--prompts", type=count, default=4, metavar="N", help="of a step; default: %(default)s")
    add("--group", type=count, default=8, metavar="N", help="answers per prompt; default: %(default)s")
    add("--tokens", type=count, default=128, metavar="N", help="of an answer; default: %(default)s")
    add("--updates", type=count, default=2, metavar="N", help="of a step; default: %(default)s")
    add("--busy", action="store_true", help="rates per processor second, for a machine that others use too")
    add_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    return run_benchmark(parser, run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
