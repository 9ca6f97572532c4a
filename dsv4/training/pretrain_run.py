"""Parts of a pre-training run, made of its recipe and folder: data of the stages, plan, model, trainer."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dsv4.checkpoint.atomic import DiskFullError
from dsv4.config import ModelConfig
from dsv4.data.augment import Rates
from dsv4.data.shard_loader import RowShape
from dsv4.model.transformer import Transformer
from dsv4.parallel.first_rank import on_first_rank
from dsv4.parallel.mesh import launched
from dsv4.parallel.pieces import Values
from dsv4.training.handover import has_state
from dsv4.training.hash_routing import install_tables
from dsv4.training.loop import NonFiniteLossError, Stage, Trainer, TrainSettings
from dsv4.training.lora import load_adapted, planned
from dsv4.training.losses import LossWeights
from dsv4.training.nano_recipe import step_flops
from dsv4.training.newton_schulz import product_dtype
from dsv4.training.optim import MuonAdamW
from dsv4.training.plan import FixedPlan, TimePlan
from dsv4.training.pretrain_recipe import PretrainRecipe
from dsv4.training.rank_loop import RankTrainer
from dsv4.training.replicas import ReplicaError
from dsv4.training.run_shards import read_fingerprints, stage_shards
from dsv4.training.schedule import Schedule
from dsv4.training.sources import TASKS, MixtureSource, PartPaths
from dsv4.training.speed import SpeedMeter, product_rate
from dsv4.training.stability import SpikeError
from dsv4.training.start import declare_model, drawn_values, folder_values, load_start
from dsv4.training.state import StateError
from dsv4.training.token_counts import keep_counts, read_counts

STOPPED = (  # errors that end a run in words
    *(ValueError, OSError, DiskFullError, MemoryError),
    *(NonFiniteLossError, ReplicaError, SpikeError, StateError),
)
SEED_STEP = 1_000_003  # between the seeds of stages, each of which takes the documents in an order of its own


def check_ranks(recipe: PretrainRecipe) -> None:
    """ValueError unless the processes that were started are the recipe's ranks."""
    degrees = recipe.parallel.degrees()
    if launched():
        degrees.check(int(os.environ["WORLD_SIZE"]), degrees.expert, degrees.pipeline)
    elif degrees.ranks > 1:
        raise ValueError(f"the recipe is for {degrees.ranks} ranks: start it by torchrun --nproc-per-node")


def make_source(recipe: PretrainRecipe, number: int, run_dir: Path, config: ModelConfig, workers: int) -> MixtureSource:
    """A stage's mixture; pieces are cut at the ends of the model's compression windows."""
    stage, data, prints = recipe.stages[number], recipe.data, read_fingerprints(run_dir)
    # Named by what they hold: the order of the documents does not depend on where they lie.
    shards = stage_shards(recipe, stage, run_dir)
    parts = [PartPaths(prints[folder], (run_dir / folder,), share) for folder, share in shards.items()]
    tasks = data.tasks if stage.tasks is None else stage.tasks
    if tasks:
        parts.append(PartPaths(TASKS, (), tasks, data.tasks_loss))
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
