"""`dsv4 bench engine`: dsv4 compared with llama.cpp and transformers, and on prompts of up to a million tokens.

Each contender has its own process; rounds interleave. Nothing is reported unless the frozen tests pass and the logits
agree. Each scenario's rows are saved as soon as it is done.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness.program import add_options, new_parser, run_benchmark
from benchmarks.harness.scenarios import SCENARIOS, quick

if TYPE_CHECKING:
    from rich.console import Console

DESCRIPTION = "Compare dsv4 with llama.cpp and transformers at the same weights: decode, prefill, memory."
EPILOG = f"""scenarios:
{chr(10).join(f"  {name:12} {scenario.about}" for name, scenario in SCENARIOS.items())}

examples:
  dsv4 bench engine --llama-bench "$(make llama-bench | tail -n 1)"
  dsv4 bench engine --models fp32
  dsv4 bench engine --models flash-width,million --scratch path/to/weights
  dsv4 bench engine --quick --without-llama --no-gate"""


def run(options: argparse.Namespace, scratch: Path, console: Console) -> None:
    """Measure and record the scenarios of `options`."""
    from benchmarks.harness import llama_cpp, report, rounds
    from benchmarks.harness.recording import record

    llama = llama_cpp.check_program(options.llama_bench) if options.llama_bench else None
    measures = {}
    for name in options.models:
        scenario = quick(SCENARIOS[name]) if options.quick else SCENARIOS[name]
        scenario = replace(scenario, rounds=options.rounds or scenario.rounds)
        measures[name] = partial(rounds.measure, scenario, options.threads, scratch, llama)
    record(measures, report.lines, options, console)


def _models(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in SCENARIOS:
            raise argparse.ArgumentTypeError(f"{name!r} is unknown; allowed: {', '.join(SCENARIOS)}")
    return names


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("engine", DESCRIPTION, EPILOG)
    add = parser.add_argument
    add("--models", type=_models, default=("slice", "nano"), metavar="A,B", help="of those below; default: slice,nano")
    add("--llama-bench", type=Path, metavar="PATH", help="llama.cpp's llama-bench (make llama-bench)")
    add("--without-llama", action="store_true", help="leave llama.cpp out")
    add_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(argv)
    compared = [name for name in options.models if "llama.cpp" in SCENARIOS[name].peers]
    if compared and not options.without_llama and options.llama_bench is None:
        parser.error(f"{', '.join(compared)}: give --llama-bench PATH (make llama-bench), or --without-llama")
    return run_benchmark(parser, run, options)


if __name__ == "__main__":
    sys.exit(main())
