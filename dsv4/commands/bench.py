"""`dsv4 bench`: run a benchmark of the checkout."""

from __future__ import annotations

import argparse
from typing import Any

from dsv4.commands.options import add_command
from dsv4.commands.scripts import run_script


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "bench",
        run,
        "run a benchmark of this repository",
        "dsv4 bench engine --help\ndsv4 bench report",
    )
    parser.add_argument("benchmark", nargs="?", metavar="BENCHMARK", help="a file of benchmarks/, without .py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the benchmark")


def run(options: argparse.Namespace) -> None:
    run_script("benchmarks", options.benchmark, options.arguments)
