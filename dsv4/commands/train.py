"""`dsv4 train`: run a recipe of the checkout."""

from __future__ import annotations

import argparse
from typing import Any

from dsv4.commands.options import add_command
from dsv4.commands.scripts import run_script


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "train",
        run,
        "run a recipe of this repository",
        "dsv4 train nano --budget cpu\ndsv4 train nano --help",
    )
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="a file of recipes/, without .py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the recipe")


def run(options: argparse.Namespace) -> None:
    run_script("recipes", options.recipe, options.arguments)
