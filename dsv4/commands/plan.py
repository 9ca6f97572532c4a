"""`dsv4 plan`: memory, time and cost of a training run, predicted from its recipe; or compared with what a run took."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4.analysis.activations import POLICIES
from dsv4.analysis.hardware import MACHINES
from dsv4.analysis.precision import PRECISIONS
from dsv4.commands.options import add_command, count, real
from dsv4.commands.recipe_flags import PARSERS, ROOT
from dsv4.presets import PRESETS

if TYPE_CHECKING:
    from dsv4.training.prediction import Choice, RunPlan
    from dsv4.training.pretrain_recipe import PretrainRecipe

CPU = "cpu"
NANO = "nano"
NANO_FILE = ROOT / "recipes" / "nano.toml"


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "plan",
        run,
        "predict memory, time and cost of a training run from its recipe",
        "dsv4 plan flash --gpus 2048\n"
        "dsv4 plan pro --gpus 2048 --device B200 --precision fp8 --expert 64 --json\n"
        "dsv4 plan recipes/stages.toml run.recompute=blocks --device cpu\n"
        "dsv4 plan recipes/nano.toml --device cpu\n"
        "dsv4 plan --check runs/text",
    )
    recipe = (
        f"a file of keys for dsv4 train pretrain or nano, or a preset ({', '.join(PRESETS)}) with the published run's "
        "stages; nano: recipes/nano.toml"
    )
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help=recipe)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="keys of the recipe to change")
    parser.add_argument("--gpus", type=count, default=None, metavar="N", help="default: the recipe's ranks, or 1")
    parser.add_argument(
        "--device", choices=[*MACHINES, CPU], default="H100", help="default: %(default)s; cpu: this machine's"
    )
    parser.add_argument(
        "--precision", choices=PRECISIONS, default=None, help="default: the recipe's, or else bf16; on cpu fp32"
    )
    for name, ranks in (
        ("data", "that share parameters (FSDP) and take rows of their own"),
        ("expert", "that share the experts and take rows of their own"),
        ("context", "that share a row"),
        ("pipeline", "that share the layers"),
    ):
        text = f"ranks {ranks} (default: chosen per stage)"
        parser.add_argument(f"--{name}", type=count, default=None, metavar="N", help=text)
    policy = "activation checkpointing (default: the recipe's, or chosen per stage if that is none)"
    parser.add_argument("--recompute", choices=POLICIES, default=None, help=policy)
    share = "share of the product rate that a run reaches (default: the device's)"
    parser.add_argument("--efficiency", type=_share, default=None, metavar="SHARE", help=share)
    price = "US dollars per GPU and hour (default: the device's)"
    parser.add_argument("--price", type=_price, default=None, metavar="DOLLARS", help=price)
    check = "compare a run of recipes/pretrain.py on a processor with its prediction"
    parser.add_argument("--check", type=Path, default=None, metavar="RUN_DIR", help=check)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")


def run(options: argparse.Namespace) -> None:
    from dsv4.commands.terminal.plan import print_comparison, print_parts, print_plan
    from dsv4.training import parts_plan, prediction

    if options.device == CPU or options.check is not None:
        _refuse_choices(options)
    if options.check is not None:
        if options.recipe is not None:
            raise ValueError(f"--check reads the run's own recipe; without {options.recipe}")
        compared = prediction.check_run(options.check, _memory_here())
        if options.json:
            print(json.dumps([one.to_dict() for one in compared], indent=2))
        else:
            print_comparison(compared)
        return
    if options.recipe is None:
        raise ValueError(f"give a recipe, or one of {', '.join(PRESETS)}; or --check RUN_DIR")
    recipe = _recipe(options.recipe, options.overrides)
    if parts_plan.has_parts(recipe):
        parts = parts_plan.plan_parts(recipe, options.overrides, partial(_plan, options=options))
        if options.json:
            print(json.dumps({"recipe": recipe, **parts.to_dict()}, indent=2))
        else:
            print_parts(recipe, parts)
        return
    plan = _plan(prediction.recipe_to_plan(recipe, options.overrides), options)
    if options.json:
        print(json.dumps({"recipe": recipe, **plan.to_dict()}, indent=2))
        return
    print_plan(recipe, plan)
    if recipe == NANO and NANO_FILE.is_file():
        print("This is one pre-training run of nano's shape; all of `dsv4 train nano` is planned by: dsv4 plan nano")


def _recipe(name: str, overrides: Sequence[str]) -> str:
    """File or preset to plan: nano is the recipe that `dsv4 train nano` runs, or its shape where keys are of one run.

    ValueError for the name of a recipe that is none of pre-training.
    """
    if Path(name).is_file() or (name in PRESETS and name != NANO):
        return name
    if name == NANO:
        from dsv4.training.nano_recipe import NanoRecipe

        whole = all(word.partition("=")[0].partition(".")[0] in NanoRecipe.model_fields for word in overrides)
        return os.path.relpath(NANO_FILE) if whole and NANO_FILE.is_file() else name
    if name in PARSERS:
        raise ValueError(
            f"{name} is a recipe of dsv4 train, which is not planned by its name; allowed: a file of keys for pretrain "
            f"or nano, such as recipes/stages.toml, or one of {', '.join(PRESETS)}"
        )
    return name


def _plan(recipe: PretrainRecipe, options: argparse.Namespace) -> RunPlan:
    from dsv4.training import prediction

    if options.device == CPU:
        rate, memory = _rate_here(recipe.run.replicas), _memory_here()
        return prediction.plan_here(recipe, recipe.model.config(), rate, memory)
    return prediction.plan_run(recipe, MACHINES[options.device], _choice(options))


def _refuse_choices(options: argparse.Namespace) -> None:
    """ValueError for flags of a plan on GPUs: a run on a processor has its recipe's keys."""
    from dataclasses import asdict

    given = [name for name, value in asdict(_choice(options)).items() if value is not None]
    if given:
        where = "--check" if options.check is not None else f"--device {CPU}"
        raise ValueError(
            f"{where} takes the recipe's own keys; without {', '.join(f'--{name}' for name in given)} (keys such as "
            "run.recompute=blocks change the recipe)"
        )


def _choice(options: argparse.Namespace) -> Choice:
    from dataclasses import fields

    from dsv4.training.prediction import Choice

    return Choice(**{field.name: getattr(options, field.name) for field in fields(Choice)})


@cache  # one measurement for all parts
def _rate_here(processes: int) -> float:
    """Products per second of this machine's processor."""
    import torch

    from dsv4.training.speed import product_rate

    return product_rate(torch.device("cpu"), processes=processes)


def _memory_here() -> float:
    """Bytes of memory that this machine has, or the cgroup's limit on them."""
    from dsv4.engine.machine import memory_limit

    return memory_limit() or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _price(text: str) -> float:
    if not 0.0 <= (value := real(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"it is {text!r}; allowed: 0 or more")
    return value


def _share(text: str) -> float:
    if not 0.0 < (value := real(text)) <= 1.0:
        raise argparse.ArgumentTypeError(f"it is {text!r}; allowed: more than 0, at most 1")
    return value
