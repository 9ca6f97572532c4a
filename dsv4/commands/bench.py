"""`dsv4 bench`: run a benchmark of the checkout."""

from __future__ import annotations

import argparse
from typing import Any

from dsv4.commands.options import add_command
from dsv4.commands.scripts import run_script, script_names


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "bench",
        run,
        "run a benchmark of this repository",
        "dsv4 bench engine --help\ndsv4 bench report",
    )
    names = ", ".join(script_names("benchmarks"))
    text = f"{names}: files of benchmarks/; --help behind it shows its flags"
    parser.add_argument("benchmark", nargs="?", metavar="BENCHMARK", help=text)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the benchmark")


def run(options: argparse.Namespace) -> None:
    run_script("benchmarks", options.benchmark, options.arguments)
