"""`dsv4 bench engine`: dsv4 beside llama.cpp and transformers at FP4 and FP8 weights, and up to a million tokens.

Each contender is a process of its own; rounds interleave. Nothing is reported unless the frozen tests are green and the
logits agree. Every model's rows are kept as soon as it is done.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.comparison.process import ROOT, BenchmarkError
from benchmarks.engines.plan import COMPARED, FULL, MODELS, QUICK, Plan

if TYPE_CHECKING:
    from rich.console import Console

    from benchmarks.engines.llama_bench import LlamaBench
    from benchmarks.engines.outcome import Outcome

DESCRIPTION = "Compare dsv4 with llama.cpp and transformers at the weights as stored: decode, prefill, memory."
EPILOG = """models:
  slice        120.9M parameters of every kind of layer, random; with llama.cpp and transformers
  nano         the embedded model; with llama.cpp and transformers
  flash-width  two layers of V4-Flash's widths, random, 7.2 GB; against what the machine can do
  million      1,048,576 tokens through nano; tens of minutes

examples:
  dsv4 bench engine --llama-bench $(make -s llama-bench)
  dsv4 bench engine --models slice --rounds 5 --llama-bench path/to/llama-bench
  dsv4 bench engine --models flash-width,million --scratch path/to/weights
  dsv4 bench engine --quick --without-llama --no-gate"""


def measure(model: str, plan: Plan, threads: int, scratch: Path, llama: LlamaBench | None, console: Console) -> Outcome:
    """One model, with its progress bar."""
    from benchmarks.comparison.progress import progress_bar
    from benchmarks.engines import million, versus, wide
    from dsv4.config import ModelConfig, nano_path

    if model == "million":
        with million.bar(console, plan.million) as advance:
            return million.measure(plan, threads, advance)
    if model == "flash-width":
        with progress_bar(console, wide.num_stages(plan)) as advance:
            return wide.measure(plan, threads, scratch, advance)
    config = plan.slice if model == "slice" else ModelConfig.from_pretrained(nano_path())
    with progress_bar(console, versus.num_stages(plan, llama is not None)) as advance:
        return versus.measure(model, config, plan, threads, scratch, llama, advance)


def run(options: argparse.Namespace, plan: Plan, llama: LlamaBench | None, console: Console) -> None:
    """Gate; then model by model: measure, append to results/<hardware>.jsonl, print; at the end context.png."""
    from benchmarks.comparison.gate import run_tests
    from benchmarks.comparison.rows import append_rows, commit, hardware, hardware_slug, package_digest
    from benchmarks.engines.aims import aim_rows
    from benchmarks.engines.plot import plot_context
    from benchmarks.engines.table import make_table, notes, title

    gated = not options.no_gate
    code, sources, machine = commit(), package_digest(), hardware()
    if gated:
        console.print("Frozen tests first: no number without them.")
        run_tests()
    file: Path = options.results / f"{hardware_slug(machine)}.jsonl"
    shared = {"benchmark": "engine", "plan": plan.name, "gated": gated, "commit": code, "threads": options.threads}
    with ExitStack() as stack:
        kept: Path | None = options.scratch
        scratch = kept or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dsv4-bench-")))
        scratch.mkdir(parents=True, exist_ok=True)
        for model in options.models:
            outcome = measure(model, plan, options.threads, scratch, llama, console)
            if package_digest() != sources:
                raise BenchmarkError("dsv4/ changed during the run, so its figures belong to no version of it: no rows")
            common = {**shared, "hardware": machine, **outcome.common()}
            append_rows(file, [*outcome.rows, *aim_rows(outcome.rows, model)], common)
            console.print(title(outcome, options.threads, gated), highlight=False)
            console.print(make_table(outcome))
            for line in notes(outcome):
                console.print(line, highlight=False)
    console.print(f"{machine['cpu']}, {machine['cores']} cores; commit {code}; rows in {file}")
    if not plot_context(file, plan.name, options.results / "context.png"):
        console.print("no plot: matplotlib is not installed")


def _models(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in MODELS:
            raise argparse.ArgumentTypeError(f"{name!r} is unknown; allowed: {', '.join(MODELS)}")
    return names


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: at least 1")
    return int(text)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dsv4 bench engine",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--models", type=_models, default=("slice", "nano"), metavar="A,B", help="of those below; default: slice,nano"
    )
    parser.add_argument("--llama-bench", type=Path, metavar="PATH", help="llama.cpp's llama-bench (make llama-bench)")
    parser.add_argument("--without-llama", action="store_true", help="compare with transformers alone")
    parser.add_argument("--rounds", type=_at_least_one, metavar="N", help=f"default: {FULL.rounds}")
    parser.add_argument("--threads", type=_at_least_one, default=2, metavar="N", help="of each; default: %(default)s")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="keep weights there; default: a temporary folder")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, short prompts: does it run?")
    parser.add_argument("--no-gate", action="store_true", help="do not run the frozen tests; the rows say so")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="default: %(default)s")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    options = parser.parse_args(argv)
    compared = [model for model in options.models if model in COMPARED]
    if compared and not options.without_llama and options.llama_bench is None:
        parser.error(f"{', '.join(compared)}: give --llama-bench PATH (make llama-bench), or --without-llama")
    plan = QUICK if options.quick else FULL
    if options.rounds is not None:
        plan = replace(plan, rounds=options.rounds)
    from rich.console import Console

    from benchmarks.engines.llama_bench import LlamaBench

    try:
        use_llama = compared and not options.without_llama
        llama = LlamaBench(options.llama_bench, options.threads) if use_llama else None
        console = Console()
        # As wide as the terminal; where there is none, wide enough for the table.
        run(options, plan, llama, console if console.is_terminal else Console(width=160))
    except BenchmarkError as error:
        print(f"dsv4 bench engine: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
