"""Train a model on text, or on shards of it, as a recipe says: from scratch, or on from a model folder.

A recipe is a TOML file; KEY=VALUE changes one of its keys, or a default. --print-config prints all keys, as a recipe.
--resume continues a run that was killed or stopped from its last saved step, to the same bits, on the same data. On
other ranks it takes their parallel.* keys: the losses are then the same but for rounding.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch.distributed as dist
from rich.console import Console

from dsv4.checkpoint.atomic import kept_if_whole, sole_writer
from dsv4.commands.recipe_flags import parse
from dsv4.engine.loading import check_device
from dsv4.parallel.first_rank import on_first_rank
from dsv4.parallel.mesh import launched, process_group
from dsv4.training.export import check_output
from dsv4.training.handover import has_state
from dsv4.training.plots import draw_run
from dsv4.training.pretrain_folder import new_run, resume_run
from dsv4.training.pretrain_recipe import PretrainRecipe
from dsv4.training.pretrain_run import STOPPED, check_ranks, make_trainer
from dsv4.training.recipe import read_recipe, split_words, write_recipe
from dsv4.training.run_export import export_run
from dsv4.training.run_shards import SHARDS
from dsv4.training.stopping import RunStoppedError


def main(arguments: list[str] | None = None, name: str = "pretrain") -> int:
    """Run the recipe; 0 when the model folder is written. `name`: of the recipe in messages on how to go on."""
    options = parse("pretrain", arguments)
    try:
        if options.print_config:
            print(write_recipe(given_recipe(options.recipe).resolve()), end="")
            return 0
        with _ranks(options) as rank:
            return _train(options, rank)
    except RunStoppedError as stopped:
        print(f"{stopped}; to go on: dsv4 train {name} --resume --run-dir {options.run_dir}", file=sys.stderr)
        return stopped.status
    except KeyboardInterrupt:
        if launched():
            raise
        if (options.run_dir / "data.json").exists() or has_state(options.run_dir):
            print(
                f"\nto go on from the last save: dsv4 train {name} --resume --run-dir {options.run_dir}",
                file=sys.stderr,
            )
        elif (options.run_dir / SHARDS).is_dir():
            print(f"\nthe same command goes on after the text that is in {options.run_dir / SHARDS}", file=sys.stderr)
        raise
    except STOPPED as error:
        raise SystemExit(f"training stopped: {error}") from error
    except RuntimeError as error:
        if not launched():
            raise
        raise SystemExit(
            f"training stopped on rank {os.environ['RANK']}: another rank ended, or its connection failed ({error}); "
            f"to go on from the last checkpoint: --resume --run-dir {options.run_dir}"
        ) from error


@contextmanager
def _ranks(options: argparse.Namespace) -> Iterator[int]:
    """This process's rank among those of a launcher, whose process group lasts as long; 0 if there is only this one."""
    if not launched():
        yield 0
        return
    path = options.run_dir / "recipe.toml"
    recipe = read_recipe(PretrainRecipe, path) if options.resume else given_recipe(options.recipe)
    with process_group(recipe.run.device):
        yield dist.get_rank()


def _train(options: argparse.Namespace, rank: int) -> int:
    run_dir: Path = options.run_dir
    out: Path = options.out or run_dir / "model"
    console = Console(quiet=rank > 0)
    recipe = resume_run(run_dir, options.recipe) if options.resume else given_recipe(options.recipe)
    check_ranks(recipe)
    check_device(recipe.run.device, "run.device")
    check_output(out, run_dir, Path(recipe.model.start) if recipe.lora.rank and recipe.model.start else None)
    with nullcontext() if rank else sole_writer(run_dir):
        with nullcontext() if options.resume or rank else kept_if_whole(run_dir):
            if not options.resume:
                given = recipe
                recipe = on_first_rank("new_run", lambda: new_run(given, run_dir, console))
            trainer = make_trainer(recipe, run_dir, options.workers, console)
        trainer.run()
        if rank == 0 and (picture := draw_run(run_dir)) is not None:  # first: a run with a model folder has ended
            console.print(f"losses: {picture}", highlight=False)
        lora = recipe.lora.settings
        export_run(trainer, lora, Path(recipe.model.start) if recipe.model.start else None, run_dir, out)
        if lora is not None:
            console.print(f"adapter: {run_dir / 'adapter'}", highlight=False)
        console.print(f"model folder: {out}", highlight=False)
        if launched():
            dist.barrier()
    return 0


def given_recipe(words: list[str]) -> PretrainRecipe:
    """Recipe of the command line: at most one file, and overrides."""
    files, keys = split_words(words)
    if len(files) > 1:
        raise ValueError(f"recipes {', '.join(files)}; allowed: one, and KEY=VALUE")
    path = Path(files[0]) if files else None
    return read_recipe(PretrainRecipe, path, keys)


if __name__ == "__main__":
    sys.exit(main())
