"""The shape of every recorded benchmark: a parser with its epilog and common flags, and the end of the program."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness.process import BenchmarkError

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
