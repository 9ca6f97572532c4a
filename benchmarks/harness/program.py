"""The shape of every recorded benchmark: a parser with its epilog and common flags, and the end of the program."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness.process import ROOT, BenchmarkError
from dsv4.commands.options import count

if TYPE_CHECKING:
    from rich.console import Console


def new_parser(name: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """The parser of `dsv4 bench NAME`, its epilog shown as it is written."""
    return argparse.ArgumentParser(
        prog=f"dsv4 bench {name}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """Flags of every recorded benchmark."""
    add = parser.add_argument
    add("--rounds", type=count, metavar="N", help="default: 3")
    add("--threads", type=count, default=2, metavar="N", help="of each; default: %(default)s")
    add("--scratch", type=Path, metavar="DIR", help="keep weights there; default: a temporary folder")
    add("--quick", action="store_true", help="tiny shapes, short prompts: does it run?")
    add("--no-gate", action="store_true", help="do not run the frozen tests; the rows say so")
    add("--results", type=Path, default=ROOT / "benchmarks" / "results", help="default: %(default)s")


def new_folder(text: str) -> Path:
    """A folder that is not there yet, of a flag's value."""
    if Path(text).exists():
        raise argparse.ArgumentTypeError(f"{text} is there; allowed: a new folder")
    return Path(text)


def run_benchmark(
    parser: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace, Path, Console], None],
    options: argparse.Namespace,
) -> int:
    """Exit status of a benchmark: `run` with its options, the folder of its weights and the terminal."""
    from rich.console import Console

    try:
        with tempfile.TemporaryDirectory(prefix="dsv4-bench-") as temporary:
            run(options, options.scratch or Path(temporary), Console())
    except BenchmarkError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


def train(main: Callable[[list[str]], int], words: list[str]) -> None:
    """Train by a recipe's main; SystemExit with its status if it was stopped: what follows needs the whole run."""
    if status := main(words):
        raise SystemExit(status)
