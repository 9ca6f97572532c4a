"""Prediction of a recipe's memory, time and cost, and its comparison with what a run took. Needs no torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path
from statistics import median
from typing import Any

from dsv4.analysis.activations import Recompute
from dsv4.analysis.adapters import Adapters
from dsv4.analysis.degrees import DIMENSIONS, Degrees
from dsv4.analysis.hardware import Machine, Precision, cpu
from dsv4.analysis.training_memory import Setting, StageShape
from dsv4.analysis.training_plan import StagePlan, choose_stage, enlarge_stage, plan_stage
from dsv4.config import ModelConfig
from dsv4.model_folder import resolve_model
from dsv4.presets import PRESETS
from dsv4.training.plots import read_metrics
from dsv4.training.pretrain_recipe import PretrainRecipe
from dsv4.training.published import published_run
from dsv4.training.recipe import read_recipe
from dsv4.training.stage_section import StageSection


@dataclass(frozen=True)
class Choice:
    """Wishes of the command line. None: the recipe's if it has one; else bf16, as many GPUs as the recipe has ranks,
    and degrees and policy chosen per stage."""

    gpus: int | None = None
    precision: Precision | None = None
    recompute: Recompute | None = None
    data: int | None = None
    expert: int | None = None
    context: int | None = None
    pipeline: int | None = None
    efficiency: float | None = None  # None: the machine's
    price: float | None = None  # per GPU and hour; None: the machine's


@dataclass(frozen=True)
class RunPlan:
    """Prediction of a whole run. `larger`: plans on more GPUs of stages that do not fit, None of others."""

    setting: Setting
    stages: tuple[StagePlan, ...]
    price: float
    larger: tuple[StagePlan | None, ...] = ()

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def gpu_hours(self) -> float:
        return self.setting.gpus * self.seconds / 3600

    @property
    def cost(self) -> float:
        return self.gpu_hours * self.price

    @property
    def fits(self) -> bool:
        return all(stage.fits for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """The plan as one object for JSON; where it does not fit, times and cost are null."""
        setting = self.setting
        time = {"seconds": self.seconds, "gpu_hours": self.gpu_hours, "cost": self.cost}
        return {
            "machine": asdict(setting.machine),
            "gpus": setting.gpus,
            "precision": setting.precision,
            "efficiency": setting.efficiency,
            "stages": [
                _stage_dict(stage) | {"fits_on": larger and asdict(larger.degrees) | {"gpus": larger.degrees.ranks}}
                for stage, larger in zip_longest(self.stages, self.larger)
            ],
            "fits": self.fits,
            "peak_memory_bytes": round(max(stage.memory.total for stage in self.stages)),
            "steps": sum(stage.shape.steps for stage in self.stages),
            "tokens": sum(stage.shape.tokens for stage in self.stages),
            "price_per_gpu_hour": self.price,
            **(time if self.fits else dict.fromkeys(time)),
        }


def _stage_dict(plan: StagePlan) -> dict[str, Any]:
    memory = {name: round(value) for name, value in asdict(plan.memory).items()}
    time = {
        "seconds_per_step": plan.step_seconds, "computation_seconds": plan.computation,
        "communication_seconds": plan.communication, "bubble": plan.bubble, "mfu": plan.mfu, "seconds": plan.seconds,
    }  # fmt: skip
    return {
        **asdict(plan.shape), "recipe_rows_per_step": plan.asked_rows, "degrees": asdict(plan.degrees),
        "recompute": plan.recompute, "micro_batches": plan.micro_batches,
        "memory_bytes": memory | {"total": round(plan.memory.total)}, "fits": plan.fits,
        **(time if plan.fits else dict.fromkeys(time)),
    }  # fmt: skip


def recipe_to_plan(name: str, overrides: Sequence[str]) -> PretrainRecipe:
    """Recipe in the file `name`, or the published run of a preset, after `overrides`; stages written out."""
    if name in PRESETS and not Path(name).is_file():
        given = {override.partition("=")[0] for override in overrides}
        adapters = [word for word in overrides if word.startswith("lora.")]
        run, ladder = published_run(name), dict[str, int]()
        if run is not None and not adapters and not any("stages." in key for key in given):
            ladder = {"ladder.tokens": run.tokens, "ladder.batch_tokens": run.batch_tokens}
        defaults = [f"{key}={value}" for key, value in ladder.items() if key not in given]
        others = [word for word in overrides if word not in adapters]
        recipe = read_recipe(PretrainRecipe, None, [f"model.base={name}", *defaults, *others]).resolve()
        return _with_adapters(recipe, adapters) if adapters else recipe
    if not Path(name).is_file():
        close = difflib.get_close_matches(name, PRESETS, n=1)
        meant = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"{name!r} is no file; allowed: a recipe in TOML, or one of {', '.join(PRESETS)}{meant}")
    return read_recipe(PretrainRecipe, Path(name), overrides).resolve()


def _with_adapters(recipe: PretrainRecipe, words: Sequence[str]) -> PretrainRecipe:
    """A preset's run with keys of lora.*, which in a run itself need a folder of weights.

    ValueError where there is no rank, or a stage has nothing to train.
    """
    lora = read_recipe(PretrainRecipe, None, words).lora
    if lora.rank is None:
        raise ValueError(f"{' '.join(words)} without lora.rank; allowed: with it")
    if any(stage.attention == "warmup" for stage in recipe.stages):
        raise ValueError("lora.rank and a stage with attention 'warmup'; allowed: dense and sparse")
    run = recipe.run.model_copy(update={"quantized_share": 0.0})
    return recipe.model_copy(update={"lora": lora, "run": run})


def stage_shapes(recipe: PretrainRecipe) -> list[StageShape]:
    """Stages of a resolved recipe. Documents count as long as the recipe allows."""
    return [_shape(stage, recipe.processes) for stage in recipe.stages]


def _shape(stage: StageSection, replicas: int) -> StageShape:
    size = stage.size(replicas)
    return StageShape(
        stage.name, stage.attention, stage.sequence, stage.row_tokens, size.last * size.tokens,
        stage.num_steps(replicas), stage.num_tokens(replicas),
    )  # fmt: skip


def plan_run(recipe: PretrainRecipe, machine: Machine, choice: Choice) -> RunPlan:
    """Predict a resolved recipe. ValueError if the given degrees do not go with it."""
    degrees = recipe.parallel.degrees()
    setting = _setting(recipe, recipe.model.config(), machine, choice)
    policies: list[Recompute | None] = [
        choice.recompute or (None if own == "none" else own) for own in _policies(recipe)
    ]
    given: dict[str, int | None] = {name: getattr(choice, name) for name in DIMENSIONS}
    if degrees.ranks > 1 and not any(given.values()):
        given |= asdict(degrees)
    shapes = list(zip(stage_shapes(recipe), policies, strict=True))
    plans = tuple(choose_stage(setting, shape, policy, **given) for shape, policy in shapes)
    larger = tuple(
        None if plan.fits else enlarge_stage(setting, shape, policy, **given)
        for plan, (shape, policy) in zip(plans, shapes, strict=True)
    )
    return RunPlan(setting, plans, machine.price if choice.price is None else choice.price, larger)


def plan_here(recipe: PretrainRecipe, config: ModelConfig, rate: float, memory: float) -> RunPlan:
    """Predict a resolved recipe on this machine's processor, as recipes/pretrain.py runs it.

    rate: products per second of all replicas together.
    """
    if recipe.parallel.degrees().ranks > 1:
        raise ValueError("the recipe has several ranks; on a CPU allowed: one process or run.replicas")
    replicas = recipe.run.replicas
    machine = cpu(memory, rate / replicas)
    setting = _setting(recipe, config, machine, Choice(replicas, "fp32"))
    rounds, base = recipe.run.precision != "fp32", _base_bytes(recipe, config)
    setting = replace(setting, rounds=rounds, shared_weights=True, base_bytes=base)
    shapes = zip(stage_shapes(recipe), _policies(recipe), strict=True)
    plans = [plan_stage(setting, shape, Degrees(data=replicas), policy) for shape, policy in shapes]
    return RunPlan(setting, tuple(plans), machine.price)


def _policies(recipe: PretrainRecipe) -> list[Recompute]:
    """Recomputation of every stage: its own `recompute`, or else the run's."""
    return [recipe.run.recompute if stage.recompute is None else stage.recompute for stage in recipe.stages]


def _setting(recipe: PretrainRecipe, config: ModelConfig, machine: Machine, choice: Choice) -> Setting:
    return Setting(
        config,
        machine,
        choice.gpus or recipe.parallel.degrees().ranks,
        choice.precision or (recipe.run.precision if "precision" in recipe.run.model_fields_set else "bf16"),
        quantized=recipe.run.quantized_share > 0,
        mtp=recipe.loss.mtp > 0,
        keep_gathered=recipe.parallel.keep_gathered,
        adapters=_adapters(recipe, config),
        stages=recipe.parallel.stages,
        efficiency=machine.efficiency if choice.efficiency is None else choice.efficiency,
    )


def _adapters(recipe: PretrainRecipe, config: ModelConfig) -> Adapters | None:
    """Adapters that the run trains; None: it trains every parameter."""
    if recipe.lora.settings is None:
        return None
    from dsv4.training.lora import planned  # imports torch, as the check of lora.* has

    return planned(recipe.lora.settings, recipe.lora.optimizer, config)


def _base_bytes(recipe: PretrainRecipe, config: ModelConfig) -> int | None:
    """Bytes of a start that stays as it is stored while adapters train; None: fp32, or no adapters."""
    if recipe.lora.rank is None:
        return None
    from dsv4.training.lora import stored_bytes

    start = recipe.model.start
    return stored_bytes(None if start is None else resolve_model(start), config, recipe.run.precision)


@dataclass(frozen=True)
class Comparison:
    """A stage of a run: what was predicted, and what it took."""

    stage: str
    steps: int
    tokens_per_step: float
    predicted_seconds: float  # per step of that many tokens
    measured_seconds: float  # median
    predicted_bytes: float
    measured_bytes: float  # peak of the main process up to here

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_run(run_dir: Path, memory: float) -> list[Comparison]:
    """Compare a run of recipes/pretrain.py on a processor with its plan, at the product rate that it measured.

    ValueError if the folder holds no such run, or none with measured speed.
    """
    if not (run_dir / "recipe.toml").is_file():
        raise ValueError(f"{run_dir} holds no run of recipes/pretrain.py (no recipe.toml)")
    recipe = read_recipe(PretrainRecipe, run_dir / "recipe.toml").resolve()
    if recipe.run.device != "cpu":
        raise ValueError(f"{run_dir} ran on {recipe.run.device}; allowed: a run on the CPU")
    rows = [row for row in _with_step_tokens(read_metrics(run_dir)) if row.get("mfu")]
    if not rows:
        raise ValueError(f"{run_dir / 'metrics.jsonl'} has no measured speed")
    rate = median(row["flops_per_second"] / row["mfu"] for row in rows)
    plan = plan_here(recipe, ModelConfig.from_pretrained(run_dir), rate, memory)
    found = [(stage, [row for row in rows if row["stage"] == stage.shape.name]) for stage in plan.stages]
    return [_compare(stage, mine) for stage, mine in found if mine]


def _compare(plan: StagePlan, rows: Sequence[Mapping[str, Any]]) -> Comparison:
    seconds = median(row["step_tokens"] / row["tokens_per_second"] for row in rows)
    tokens = sum(row["step_tokens"] for row in rows) / len(rows)
    return Comparison(
        plan.shape.name,
        len(rows),
        tokens,
        plan.step_seconds * tokens / plan.shape.batch_tokens,
        seconds,
        plan.memory.total,
        max(row["peak_memory_bytes"] for row in rows),
    )


def _with_step_tokens(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The steps, each with the tokens that it saw itself."""
    before = [0, *(row["tokens"] for row in rows)]
    return [{**row, "step_tokens": row["tokens"] - seen} for seen, row in zip(before, rows, strict=False)]
