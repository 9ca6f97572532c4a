"""`dsv4 train`: run a recipe of the checkout."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from dsv4.commands.options import add_command
from dsv4.commands.recipe_flags import PARSERS, parse
from dsv4.commands.scripts import run_script

EXAMPLES = """\
dsv4 train demo
dsv4 train pretrain model.start=nano data.text=docs stages.0.steps=20 --run-dir runs/more
dsv4 train pretrain model.start=nano lora.rank=16 data.text=docs stages.0.steps=20 --run-dir runs/lora
dsv4 train sft models/nano talks.jsonl --dry-run 3
dsv4 train grpo models/nano problems.tasks='["gcd", "number_sorting"]' run.steps=20 --run-dir runs/grpo
dsv4 train plot runs/more
dsv4 train sft --help"""


def add(commands: Any) -> None:
    parser = add_command(commands, "train", run, "run a recipe of this repository", EXAMPLES)
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help=f"{', '.join(PARSERS)}: files of recipes/")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the recipe")


def run(options: argparse.Namespace) -> None:
    if options.recipe in PARSERS:
        parse(options.recipe, options.arguments)  # help and refusals before the recipe imports torch
    if sys.argv[1:2] == ["train"]:  # a process of its own, and not a caller of `main`
        from dsv4.training.memory import restart_merging_blocks

        restart_merging_blocks()
    run_script("recipes", options.recipe, options.arguments)
