"""`dsv4 train`: run a recipe of the checkout."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from dsv4.commands.options import add_command
from dsv4.commands.recipe_flags import PARSERS, parse
from dsv4.commands.scripts import run_script

READ_FILES = ("nano", "v4")  # recipes whose TOML file has their name; other files are for pretrain
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
    recipe = options.recipe
    if recipe is not None and recipe.endswith(".toml"):
        reads = Path(recipe).stem if Path(recipe).stem in READ_FILES else "pretrain"
        words = " ".join([recipe, *options.arguments])
        raise ValueError(f"{recipe} is a file of keys; to train by it: dsv4 train {reads} {words}")
    if recipe in PARSERS:
        parse(recipe, options.arguments)  # help and refusals before the recipe imports torch
    if sys.argv[1:2] == ["train"]:  # a process of its own, and not a caller of `main`
        from dsv4.training.memory import restart_merging_blocks

        restart_merging_blocks()
    run_script("recipes", recipe, options.arguments)
