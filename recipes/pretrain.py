"""Train a model on text, or on shards of it, as a recipe says: from scratch, or on from a model folder.

A recipe is a TOML file; KEY=VALUE changes one of its keys, or a default. --print-config prints all keys, as a recipe.
--resume continues a run that was killed or stopped from its last saved step, to the same bits, on the same data. On
other ranks it takes their parallel.* keys: the losses are then the same but for rounding.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from dsv4.checkpoint.atomic import DiskFullError, kept_if_whole, new_file, new_folder, sole_writer
from dsv4.commands.recipe_flags import parse
from dsv4.config import ModelConfig
from dsv4.data.augment import Rates
from dsv4.data.records import find_sources
from dsv4.data.shard_loader import RowShape
from dsv4.data.shards import Index, hash_file
from dsv4.data.tokenizing import ShardWriter
from dsv4.engine.loading import check_device
from dsv4.model.transformer import Transformer
from dsv4.model_folder import resolve_model
from dsv4.parallel.first_rank import on_first_rank
from dsv4.parallel.mesh import launched, process_group
from dsv4.parallel.pieces import Values
from dsv4.tokenizer import Tokenizer
from dsv4.training.export import TOKENIZER_FILES, check_output
from dsv4.training.handover import has_state
from dsv4.training.hash_routing import install_tables
from dsv4.training.loop import NonFiniteLossError, Stage, Trainer, TrainSettings
from dsv4.training.lora import load_adapted, planned
from dsv4.training.losses import LossWeights
from dsv4.training.nano_recipe import step_flops
from dsv4.training.newton_schulz import product_dtype
from dsv4.training.optim import MuonAdamW
from dsv4.training.plan import FixedPlan, TimePlan
from dsv4.training.plots import draw_run
from dsv4.training.pretrain_recipe import PretrainRecipe
from dsv4.training.rank_loop import RankTrainer
from dsv4.training.recipe import read_recipe, split_words, write_recipe
from dsv4.training.replicas import ReplicaError
from dsv4.training.run_export import export_run
from dsv4.training.run_shards import SHARDS, check_shards, placed_share, read_fingerprints, stage_shards
from dsv4.training.schedule import Schedule
from dsv4.training.sources import TASKS, MixtureSource, PartPaths
from dsv4.training.speed import SpeedMeter, product_rate
from dsv4.training.stability import SpikeError
from dsv4.training.start import declare_model, drawn_values, fingerprint, folder_values, load_start
from dsv4.training.state import StateError
from dsv4.training.stopping import RunStoppedError
from dsv4.training.token_counts import keep_counts, read_counts

STOPPED = (
    *(ValueError, OSError, DiskFullError, MemoryError),
    *(NonFiniteLossError, ReplicaError, SpikeError, StateError),
)
SEED_STEP = 1_000_003  # between the seeds of stages, each of which takes the documents in an order of its own


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


def check_ranks(recipe: PretrainRecipe) -> None:
    """ValueError unless the processes that were started are the recipe's ranks."""
    degrees = recipe.parallel.degrees()
    if launched():
        degrees.check(int(os.environ["WORLD_SIZE"]), degrees.expert, degrees.pipeline)
    elif degrees.ranks > 1:
        raise ValueError(f"the recipe is for {degrees.ranks} ranks: start it by torchrun --nproc-per-node")


def new_run(recipe: PretrainRecipe, run_dir: Path, console: Console) -> PretrainRecipe:
    """Make a run's folder: tokenizer, model config, shards of its text, recipe.toml, data.json.

    A run is never overwritten.
    """
    if (run_dir / "data.json").exists():
        raise ValueError(f"{run_dir} already holds a run; pass --resume to go on with it, or another --run-dir")
    recipe = recipe.resolve()
    data = recipe.data
    for stage in recipe.stages:
        tasks = data.tasks if stage.tasks is None else stage.tasks
        if not (data.text or data.shards or stage.shards or tasks):
            raise ValueError(f"stage {stage.name!r} has no data: give data.text, data.shards or data.tasks")
    source = recipe.model.tokenizer if data.tokenizer is None else resolve_model(data.tokenizer)
    check_tokenizer(recipe, source)
    config = recipe.model.config()
    place_tokenizer(source, run_dir / "tokenizer")
    size = Tokenizer.from_pretrained(run_dir / "tokenizer").vocab_size
    if recipe.model.start is None:
        config = replace(config, vocab_size=size)
    elif size > config.vocab_size:
        raise ValueError(
            f"the tokenizer {source} has {size} tokens, but {recipe.model.start} is for {config.vocab_size}"
        )
    recipe = recipe.model_copy(
        update={
            "data": data.model_copy(update={"shards": tuple(placed_share(one, run_dir) for one in data.shards)}),
            "stages": tuple(
                stage.model_copy(update={"shards": tuple(placed_share(one, run_dir) for one in stage.shards)})
                for stage in recipe.stages
            ),
        }
    )
    folders = {folder for stage in recipe.stages for folder in stage_shards(recipe, stage, run_dir)}
    for folder in sorted(folders - {SHARDS}):  # before the text is tokenized, which may take long
        check_shards(run_dir / folder, run_dir / "tokenizer")
    if data.text:
        sources = find_sources(list(data.text), data.column)
        writer = ShardWriter(sources, run_dir / "tokenizer", run_dir / SHARDS)
        console.print(f"text: {writer.run().counts.tokens:,} tokens", highlight=False)
    prints = {folder: Index.read(run_dir / folder).fingerprint for folder in sorted(folders)}
    texts = {"config.json": json.dumps(config.to_dict(), indent=2) + "\n", "recipe.toml": write_recipe(recipe)}
    if recipe.model.start is not None:
        texts["start.json"] = json.dumps({"fingerprint": fingerprint(Path(recipe.model.start))}) + "\n"
    texts["data.json"] = json.dumps(prints, indent=2) + "\n"  # last: a folder with it holds a run
    for name, text in texts.items():
        with new_file(run_dir / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return recipe


def place_tokenizer(source: Path, folder: Path) -> None:
    """Copy a tokenizer's files to a run's `folder`, which may be an earlier such copy, or `source` itself.

    ValueError if it holds anything else, which the run's model folder would get.
    """
    files = {name: (source / name).read_bytes() for name in TOKENIZER_FILES if (source / name).is_file()}
    if not folder.is_dir() or not any(folder.iterdir()):
        with new_folder(folder, overwrite=False) as unfinished:
            for name, content in files.items():
                (unfinished / name).write_bytes(content)
    elif {path.name: path.read_bytes() if path.is_file() else None for path in folder.iterdir()} != files:
        raise ValueError(
            f"{folder} holds something else than a copy of {source}'s {', '.join(TOKENIZER_FILES)}; rename it, or give "
            "another --run-dir"
        )


def resume_run(run_dir: Path, words: list[str]) -> PretrainRecipe:
    """Read the run's recipe and check that the data is what it was."""
    if any(not word.startswith("parallel.") for word in words):
        raise ValueError(f"--resume goes on with the run's own recipe but for parallel.*; without {' '.join(words)}")
    if not (run_dir / "data.json").exists():
        raise ValueError(f"--resume: {run_dir} holds no run (no data.json)")
    begun = read_recipe(PretrainRecipe, run_dir / "recipe.toml")
    recipe = read_recipe(PretrainRecipe, run_dir / "recipe.toml", words)
    recipe.check_ranks(ModelConfig.from_pretrained(run_dir))
    for stage in recipe.stages:
        before, now = stage.size(begun.processes), stage.size(recipe.processes)
        if (before.tokens * before.last, before.tokens * before.first) != (
            now.tokens * now.last,
            now.tokens * now.first,
        ):
            raise ValueError(
                f"--resume: steps of stage {stage.name!r} had {before.tokens * before.last} tokens and would have "
                f"{now.tokens * now.last}: set batch_tokens when a run is to go on with other ranks"
            )
        if (before.ramp, stage.num_steps(begun.processes)) != (now.ramp, stage.num_steps(recipe.processes)):
            raise ValueError(
                f"--resume: steps of stage {stage.name!r} grow by multiples of {before.tokens} tokens on "
                f"{begun.processes} processes and would grow by multiples of {now.tokens} on {recipe.processes}, so "
                "that rows would be left out or taken twice; allowed: parallel.data x parallel.expert of "
                f"{begun.processes // begun.run.replicas}, with any context and pipeline"
            )
    for folder, began in read_fingerprints(run_dir).items():
        if Index.read(run_dir / folder).fingerprint != began:
            raise ValueError(f"--resume: {folder} holds other data than the run began with")
    check_start(recipe, run_dir)
    return recipe


def check_tokenizer(recipe: PretrainRecipe, source: Path) -> None:
    """ValueError if data.tokenizer is another than the start's, whose ids mean other texts."""
    if recipe.model.start is None:
        return
    own = Path(recipe.model.start) / "tokenizer.json"
    if own.is_file() and hash_file(own) != hash_file(source / "tokenizer.json"):
        raise ValueError(f"data.tokenizer {source} is another tokenizer than that of {recipe.model.start}")
    if not (source / "tokenizer.json").is_file():
        raise ValueError(f"{recipe.model.start} has no tokenizer.json; give data.tokenizer")


def check_start(recipe: PretrainRecipe, run_dir: Path) -> None:
    """ValueError if the run still needs the weights that it began with, and they are others now."""
    if recipe.model.start is None or (recipe.lora.rank is None and has_state(run_dir)):
        return
    began = json.loads((run_dir / "start.json").read_text(encoding="utf-8"))["fingerprint"]
    if fingerprint(Path(recipe.model.start)) != began:
        raise ValueError(f"--resume: {recipe.model.start} holds other weights than the run began with")


def make_source(recipe: PretrainRecipe, number: int, run_dir: Path, config: ModelConfig, workers: int) -> MixtureSource:
    """A stage's mixture; pieces are cut at the ends of the model's compression windows."""
    stage, data, prints = recipe.stages[number], recipe.data, read_fingerprints(run_dir)
    # Named by what they hold: the order of the documents does not depend on where they lie.
    shards = stage_shards(recipe, stage, run_dir)
    parts = [PartPaths(prints[folder], (run_dir / folder,), share) for folder, share in shards.items()]
    tasks = data.tasks if stage.tasks is None else stage.tasks
    if tasks:
        parts.append(PartPaths(TASKS, (), tasks, "all"))
    return mixture_source(recipe, number, run_dir / "tokenizer", parts, config, workers)


def mixture_source(
    recipe: PretrainRecipe,
    number: int,
    tokenizer: Path,
    parts: Sequence[PartPaths],
    config: ModelConfig,
    workers: int = 0,
) -> MixtureSource:
    """Rows of a stage from `parts`."""
    stage, data = recipe.stages[number], recipe.data
    alignment = math.lcm(*(ratio for ratio in config.compress_ratios if ratio))
    shape = RowShape(stage.row_tokens, stage.sequence, data.group_rows, alignment, data.whole_documents)
    rates = Rates(data.fill_in_middle, data.split_merged)
    return MixtureSource(tokenizer, tuple(parts), recipe.run.seed + SEED_STEP * number, shape, rates, workers)


def make_stages(recipe: PretrainRecipe, run_dir: Path, config: ModelConfig, workers: int) -> tuple[list[Stage], int]:
    """The run's stages, and its steps."""
    replicas = recipe.processes
    steps = [stage.num_steps(replicas) for stage in recipe.stages]
    stages = [
        Stage(
            stage.name,
            count / sum(steps),
            make_source(recipe, number, run_dir, config, workers),
            stage.attention,
            stage.size(replicas),
            stage.rate,
            stage.recompute,
        )
        for number, (stage, count) in enumerate(zip(recipe.stages, steps, strict=True))
    ]
    return stages, sum(steps)


def make_plan(recipe: PretrainRecipe, steps: int, config: ModelConfig, run_dir: Path) -> FixedPlan | TimePlan:
    """Plan of a run of `steps` steps, or of a budget of seconds."""
    seconds = recipe.run.seconds
    if seconds is None:
        return FixedPlan(steps)
    if launched():
        raise ValueError(f"run.seconds is {seconds} in a run of many ranks, whose clocks differ; allowed: left out")
    return TimePlan(run_dir / "plan.json", seconds, step_flops(recipe, config))


def make_model(
    recipe: PretrainRecipe, config: ModelConfig, run_dir: Path, stages: list[Stage], generator: torch.Generator
) -> Transformer:
    """The model as the run begins, on its device; if its state is saved, without the weights or tables of a start.

    On ranks that train every parameter it is on the meta device, without its values.
    """
    start, lora, device = recipe.model.start, recipe.lora.settings, torch.device(recipe.run.device)
    if start is not None and lora is not None:
        return load_adapted(Path(start), lora, device, generator)
    if launched():
        return declare_model(config)
    if start is not None and not has_state(run_dir):
        return load_start(Path(start), config, device)
    model = Transformer(config)
    if start is None:
        model.init_weights(generator)
        if config.num_hash_layers and not (run_dir / "state.pt").exists():
            install_tables(model, token_counts(recipe, config, run_dir, stages), generator)
    model.to(device)
    return model


def make_values(
    recipe: PretrainRecipe, config: ModelConfig, run_dir: Path, stages: list[Stage], generator: torch.Generator
) -> Values | None:
    """The values of make_model's model, for the pieces of ranks that train every parameter."""
    if recipe.lora.rank is not None:
        return None
    if recipe.model.start is not None:
        return folder_values(Path(recipe.model.start))
    counts = partial(token_counts, recipe, config, run_dir, stages) if config.num_hash_layers else None
    return drawn_values(config, generator, counts)


def token_counts(recipe: PretrainRecipe, config: ModelConfig, run_dir: Path, stages: list[Stage]) -> Sequence[float]:
    """Occurrences of each token id that the run is to see, counted by its first rank as it begins."""
    counted: list[tuple[MixtureSource, float]] = []
    for stage, section in zip(stages, recipe.stages, strict=True):
        assert isinstance(stage.source, MixtureSource)
        counted.append((stage.source, section.num_tokens(recipe.processes)))
    on_first_rank("token_counts", lambda: keep_counts(run_dir, counted, config.vocab_size))
    return read_counts(run_dir).tolist()


def make_trainer(recipe: PretrainRecipe, run_dir: Path, workers: int, console: Console) -> Trainer | RankTrainer:
    """Build model, optimizer and data of the run, at the step saved in `run_dir`."""
    check_ranks(recipe)
    run, optimizing, loss = recipe.run, recipe.optimizer, recipe.loss
    torch.manual_seed(run.seed)
    generator = torch.Generator().manual_seed(run.seed)
    config = ModelConfig.from_pretrained(run_dir)
    stages, steps = make_stages(recipe, run_dir, config, workers)
    model = make_model(recipe, config, run_dir, stages, generator)
    settings = TrainSettings(
        Schedule(
            optimizing.rate,
            optimizing.warmup_steps,
            optimizing.decay_fraction,
            optimizing.final_ratio,
        ),
        grad_clip=optimizing.grad_clip,
        loss_weights=LossWeights(loss.mtp, loss.balance, loss.indexer),
        mtp_weight_in_decay=loss.mtp_in_decay,
        balance_speed=optimizing.balance_speed if recipe.lora.rank is None else 0.0,  # router biases stay as well
        quantized_share=run.quantized_share,
        precision=run.precision,
        replicas=run.replicas,
        save_every=run.save_every,
        recompute=run.recompute,
        count_clamps=run.count_clamps,
        stability=recipe.stability.settings(),
    )
    device = torch.device(run.device)
    chosen: dict[str, Any] = {
        "momentum": optimizing.momentum,
        "weight_decay": optimizing.weight_decay,
        "compute_dtype": product_dtype(device),
        "adapters": "adamw_no_decay" if recipe.lora.optimizer == "adamw" else "muon",
    }
    on_gpu = device.type != "cpu" and run.precision != "fp32"
    dtype = torch.bfloat16 if on_gpu else torch.float32  # fp32 on a CPU, on whose rate `dsv4 plan` is calibrated
    lora = recipe.lora.settings
    adapters = planned(lora, recipe.lora.optimizer, config) if lora is not None else None
    speed = SpeedMeter(config, device, partial(product_rate, device, dtype, recipe.all_processes), adapters)
    plan, degrees = make_plan(recipe, steps, config, run_dir), recipe.parallel.degrees()
    if launched():
        return RankTrainer(
            model, chosen, stages, settings, plan, run_dir, degrees, console, speed=speed, tensorboard=run.tensorboard,
            keep_gathered=recipe.parallel.keep_gathered,
            layers=recipe.parallel.stages, device=device,
            values=make_values(recipe, config, run_dir, stages, generator),
        )  # fmt: skip
    optimizer = MuonAdamW(model, config, **chosen)
    return Trainer(model, optimizer, stages, settings, plan, run_dir, console, speed=speed, tensorboard=run.tensorboard)


if __name__ == "__main__":
    sys.exit(main())
