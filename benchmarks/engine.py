"""`dsv4 bench engine`: dsv4 compared with llama.cpp and transformers, and on prompts of up to a million tokens.

Each contender has its own process; rounds interleave. Nothing is reported unless the frozen tests pass and the logits
agree. Each scenario's rows are saved as soon as it is done.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness.process import ROOT, BenchmarkError
from benchmarks.harness.scenarios import SCENARIOS, quick
from benchmarks.harness.turns import at_least_one

if TYPE_CHECKING:
    from rich.console import Console

DESCRIPTION = "Compare dsv4 with llama.cpp and transformers at the same weights: decode, prefill, memory."
EPILOG = f"""scenarios:
{chr(10).join(f"  {name:12} {scenario.about}" for name, scenario in SCENARIOS.items())}

examples:
  dsv4 bench engine --llama-bench $(make -s llama-bench)
  dsv4 bench engine --models fp32
  dsv4 bench engine --models flash-width,million --scratch path/to/weights
  dsv4 bench engine --quick --without-llama --no-gate"""


def run(options: argparse.Namespace, scratch: Path, console: Console) -> None:
    """Run the gate, then measure each scenario, append it to results/<hardware>.jsonl and print it."""
    from benchmarks.harness import gate, llama_cpp, machine, report, results, rounds

    llama = llama_cpp.check_program(options.llama_bench) if options.llama_bench else None
    code, sources, hardware = results.commit(), results.package_digest(), machine.hardware()
    if not options.no_gate:
        console.print("Frozen tests first: no number without them.")
        gate.run_tests()
    file: Path = options.results / f"{machine.hardware_slug(hardware)}.jsonl"
    for name in options.models:
        scenario = quick(SCENARIOS[name]) if options.quick else SCENARIOS[name]
        scenario = replace(scenario, rounds=options.rounds or scenario.rounds)
        with console.status(name) as status:
            found = rounds.measure(scenario, options.threads, scratch, llama, status.update)
        if results.package_digest() != sources:
            raise BenchmarkError("dsv4/ changed during the run, so its figures belong to no version of it: no rows")
        found.quick, found.gated, found.commit, found.hardware = options.quick, not options.no_gate, code, hardware
        results.append(file, found)
        console.print(f"\n{name}\n" + "\n".join(report.lines(found)), highlight=False, markup=False, soft_wrap=True)
    console.print(f"{hardware['cpu']}, {hardware['cores']} cores; commit {code}; rows in {file}")
    console.print("`dsv4 bench report` writes docs/benchmarks.md from them.")


def _models(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in SCENARIOS:
            raise argparse.ArgumentTypeError(f"{name!r} is unknown; allowed: {', '.join(SCENARIOS)}")
    return names


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dsv4 bench engine",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--models", type=_models, default=("slice", "nano"), metavar="A,B", help="of those below; default: slice,nano")
    add("--llama-bench", type=Path, metavar="PATH", help="llama.cpp's llama-bench (make llama-bench)")
    add("--without-llama", action="store_true", help="leave llama.cpp out")
    add("--rounds", type=at_least_one, metavar="N", help="default: 3")
    add("--threads", type=at_least_one, default=2, metavar="N", help="of each; default: %(default)s")
    add("--scratch", type=Path, metavar="DIR", help="keep weights there; default: a temporary folder")
    add("--quick", action="store_true", help="tiny shapes, short prompts: does it run?")
    add("--no-gate", action="store_true", help="do not run the frozen tests; the rows say so")
    add("--results", type=Path, default=ROOT / "benchmarks" / "results", help="default: %(default)s")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(argv)
    compared = [name for name in options.models if "llama.cpp" in SCENARIOS[name].peers]
    if compared and not options.without_llama and options.llama_bench is None:
        parser.error(f"{', '.join(compared)}: give --llama-bench PATH (make llama-bench), or --without-llama")
    from rich.console import Console

    try:
        with tempfile.TemporaryDirectory(prefix="dsv4-bench-") as temporary:
            run(options, options.scratch or Path(temporary), Console())
    except BenchmarkError as error:
        print(f"dsv4 bench engine: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
