"""Keys of a pre-training recipe with their defaults (reasons: docs/training.md), and the settings that follow."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, model_validator

from dsv4.analysis.activations import Recompute
from dsv4.analysis.precision import Precision
from dsv4.config import ModelConfig, nano_path
from dsv4.model_folder import resolve_model
from dsv4.presets import PRESETS
from dsv4.training.lora_settings import DEFAULT_TARGETS, AdapterOptimizer, LoraSettings
from dsv4.training.parallel_section import ParallelSection
from dsv4.training.published import published_run
from dsv4.training.recipe import Section
from dsv4.training.spikes import SpikeSettings, Statistic
from dsv4.training.stability_settings import AfterLast, Anticipate, StabilitySettings
from dsv4.training.stage_section import Count, LadderSection, Share, StageSection, Texts, default_stages
from dsv4.training.start_shapes import check_shapes

_TYPES = get_type_hints(ModelConfig)
# Learning rates of runs that go on from trained weights: about Flash's peak, and what adapters take.
START_RATE, LORA_RATE = 3e-4, 1e-3
LAYER_KEYS = {"num_hidden_layers", "compress_ratios", "num_nextn_predict_layers"}


class ModelSection(Section):
    """The model: a shape to train from scratch or a model to go on with, and any key of config.json under its own name.

    With `start`, only keys may change that leave every tensor its shape.
    """

    model_config = ConfigDict(extra="allow")
    base: str | None = None  # preset, model folder or owner/name; its weights are not read. Left out: nano
    start: str | None = None  # model folder or owner/name whose weights and tokenizer the run goes on with
    layers: Count | None = None

    @classmethod
    def more_keys(cls) -> Iterable[str]:
        return (field.name for field in fields(ModelConfig))

    @model_validator(mode="after")
    def _check_keys(self) -> ModelSection:
        given = self.model_extra or {}
        if self.start is not None and (self.base is not None or self.layers is not None):
            other = "base" if self.base is not None else "layers"
            raise ValueError(f"start and {other}; allowed: one of them, since a start has its own shape")
        for key, value in given.items():
            try:
                given[key] = TypeAdapter(_TYPES[key]).validate_python(value)
            except ValueError as error:
                raise ValueError(f"{key} is {value!r}; it must be {_TYPES[key]}") from error
        if self.layers is not None and LAYER_KEYS & given.keys():
            raise ValueError(f"layers and {', '.join(sorted(LAYER_KEYS & given.keys()))}; allowed: one of them")
        return self

    def config(self) -> ModelConfig:
        """The model's hyperparameters. ValueError if V4, or the shape of the start's tensors, does not allow them."""
        if self.start is not None:
            start = _start_config(self.start)
            config = replace(start, **(self.model_extra or {}))
            check_shapes(config, start, self.start)
            return config
        base = self._base
        config = ModelConfig.preset(base) if base in PRESETS else ModelConfig.from_pretrained(base)
        if self.layers is not None:
            config = _with_layers(config, self.layers)
        return replace(config, **(self.model_extra or {}))

    @property
    def tokenizer(self) -> Path:
        """Folder of the tokenizer of the start or the base; of a preset, the embedded model's."""
        if self.start is not None:
            return resolve_model(self.start)
        return nano_path() if self._base in PRESETS else resolve_model(self._base)

    @property
    def _base(self) -> str:
        return "nano" if self.base is None else self.base

    def resolve(self, config: ModelConfig) -> ModelSection:
        """The same model with every key of `config` written out; a start by its whole path."""
        keys = {f.name: getattr(config, f.name) for f in fields(config)}
        if self.start is not None:
            return ModelSection(start=str(resolve_model(self.start).absolute()), **keys)
        return ModelSection(base=self._base, **keys)


class DataSection(Section):
    """Text or shards; a stage may take others."""

    text: Texts = ()
    column: str | None = None  # of the text in JSONL and Parquet files; left out: "text", or "messages" without it
    shards: Texts = ()  # FOLDER or FOLDER=SHARE of the tokens
    tasks: Annotated[float, Field(ge=0.0)] = 0.0
    tasks_loss: Literal["all", "mask"] = "all"  # on all tokens of the tasks, or on what the assistant says in them
    tokenizer: str | None = None
    group_rows: Annotated[int, Field(ge=2)] = 128
    whole_documents: bool = False  # none is cut to fill a row, but one longer than `sequence` is
    fill_in_middle: Share = 0.1
    split_merged: Share = 0.1

    @model_validator(mode="after")
    def _check_whole(self) -> DataSection:
        if self.whole_documents and (self.fill_in_middle or self.split_merged):
            raise ValueError(
                f"whole_documents with fill_in_middle {self.fill_in_middle} and split_merged {self.split_merged}, by "
                "which documents grow; allowed: with 0 for both"
            )
        return self


class OptimizerSection(Section):
    rate: Annotated[float, Field(gt=0.0)] = 3e-3
    warmup_steps: Annotated[int, Field(ge=0)] = 40
    decay_fraction: Share = 0.3
    final_ratio: Share = 0.1
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    momentum: Share = 0.95
    grad_clip: Annotated[float, Field(gt=0.0)] = 1.0
    balance_speed: Annotated[float, Field(ge=0.0)] = 3e-3


class LossSection(Section):
    """Weights of the loss besides the next token's."""

    mtp: Annotated[float, Field(ge=0.0)] = 0.3
    mtp_in_decay: Annotated[float, Field(ge=0.0)] = 0.1
    balance: Annotated[float, Field(ge=0.0)] = 1e-4
    indexer: Annotated[float, Field(ge=0.0)] = 1.0


class LoraSection(Section):
    """Adapters in place of training every parameter."""

    rank: Count | None = None  # left out: no adapters
    alpha: Annotated[float, Field(gt=0.0)] = 32.0
    targets: Annotated[Texts, Field(min_length=1)] = DEFAULT_TARGETS
    optimizer: AdapterOptimizer = "adamw"

    @property
    def settings(self) -> LoraSettings | None:
        """None if no adapters are asked for."""
        return LoraSettings(self.rank, self.alpha, self.targets) if self.rank is not None else None

    def check(self, model: ModelSection, config: ModelConfig, run: RunSection, stages: Iterable[StageSection]) -> None:
        """ValueError for settings of the run that adapters do not go with."""
        if self.rank is None:
            if self != LoraSection():
                raise ValueError("keys of lora without lora.rank; allowed: with it")
            return
        if model.start is None:
            raise ValueError("lora.rank without model.start; allowed: with the model that the adapters are for")
        if config != _start_config(model.start):
            raise ValueError("lora.rank and a changed key of the model; allowed: the model of model.start as it is")
        if run.replicas > 1:
            raise ValueError(f"lora.rank and run.replicas {run.replicas}; allowed: 1")
        if run.quantized_share:
            raise ValueError(
                f"lora.rank and run.quantized_share {run.quantized_share}; allowed: 0, since matrices are not merged"
            )
        warm = [stage.name for stage in stages if stage.attention == "warmup"]
        if warm:
            raise ValueError(f"lora.rank and stage {warm[0]!r} with attention 'warmup'; allowed: dense and sparse")
        from dsv4.training.lora import check_targets  # imports torch, which a plan of a run does without

        check_targets(self.targets, config)


class RunSection(Section):
    seed: int = 1
    seconds: Annotated[float, Field(gt=0.0)] | None = None  # length of the run; the stages' are then its shares
    replicas: Count = 1
    device: str = "cpu"
    save_every: Count = 100
    quantized_share: Share = 0.0  # last part of the run, trained with the stored (FP4, FP8) weight values
    precision: Precision = "fp32"
    recompute: Recompute = "none"
    count_clamps: bool = False
    tensorboard: bool = False


class StabilitySection(Section):
    """Answer to loss spikes: rollbacks, and Anticipatory Routing after them. Without `rollback` the rest is unused."""

    rollback: bool = False
    statistic: Statistic = SpikeSettings.statistic
    window: int = SpikeSettings.window
    fewest: int = SpikeSettings.fewest
    threshold: float = SpikeSettings.threshold
    floor: float = SpikeSettings.floor
    patience: int = SpikeSettings.patience
    keep: int = StabilitySettings.keep
    margin: int = StabilitySettings.margin
    max_rollbacks: int = StabilitySettings.max_rollbacks
    recovered: int = StabilitySettings.recovered
    after_last: AfterLast = StabilitySettings.after_last
    anticipate: Anticipate = StabilitySettings.anticipate
    anticipate_steps: int = StabilitySettings.anticipate_steps
    delay: int = StabilitySettings.delay

    @model_validator(mode="after")
    def _check(self) -> StabilitySection:
        self._settings()
        return self

    def settings(self) -> StabilitySettings | None:
        """Settings of the run; None without rollbacks."""
        return self._settings() if self.rollback else None

    def _settings(self) -> StabilitySettings:
        values = self.model_dump(exclude={"rollback"})
        spikes = SpikeSettings(**{f.name: values.pop(f.name) for f in fields(SpikeSettings)})
        return StabilitySettings(spikes, **values)


class PretrainRecipe(Section):
    """A whole pre-training run."""

    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    optimizer: OptimizerSection = OptimizerSection()
    loss: LossSection = LossSection()
    run: RunSection = RunSection()
    lora: LoraSection = LoraSection()
    parallel: ParallelSection = ParallelSection()
    stability: StabilitySection = StabilitySection()
    ladder: LadderSection = LadderSection()
    stages: tuple[StageSection, ...] = ()

    @property
    def processes(self) -> int:
        """Processes with batches of their own."""
        return self.run.replicas * self.parallel.degrees().batches

    @property
    def all_processes(self) -> int:
        """Processes that compute."""
        return self.run.replicas * self.parallel.degrees().ranks

    def check_ranks(self, config: ModelConfig) -> None:
        """ValueError if the model, or a setting of the run, does not go with the ranks of `parallel`."""
        alone = [f"run.replicas {self.run.replicas}"] if self.run.replicas > 1 else []
        self.parallel.check(config, alone)

    def resolve(self) -> PretrainRecipe:
        """The same run with every key of the model and every stage written out.

        ValueError if the model, a stage or its batch size is not allowed.
        """
        config = self.model.config()
        if self.stages and self.ladder.tokens is not None:
            raise ValueError("the recipe has stages and ladder.tokens, which makes stages; allowed: one of them")
        stages = self.stages or default_stages(self.ladder, config, self.processes)
        for stage in stages:
            stage.size(self.processes)
            if stage.row_tokens < stage.sequence:
                raise ValueError(
                    f"stage {stage.name!r}: row_tokens {stage.row_tokens}; allowed: sequence, {stage.sequence}, or more"
                )
            if stage.attention == "warmup" and not config.has_indexer:
                raise ValueError(f"stage {stage.name!r}: no layer of the model has an indexer to warm up")
        self.lora.check(self.model, config, self.run, stages)
        self.check_ranks(config)
        update: dict[str, Any] = {
            "model": self.model.resolve(config),
            "optimizer": self._resolve_optimizer(),
            "stages": tuple(stages),
            "ladder": LadderSection(),
        }
        return self.model_copy(update=update)

    def _resolve_optimizer(self) -> OptimizerSection:
        """The optimizer with the defaults of what it trains: a published shape, a start's weights, adapters."""
        defaults: dict[str, float] = {}
        if self.model.start is not None:
            defaults["rate"] = START_RATE if self.lora.rank is None else LORA_RATE
        elif (run := published_run(self.model.base)) is not None:
            defaults |= {"rate": run.rate, "warmup_steps": run.warmup_steps, "balance_speed": run.balance_speed}
        given = self.optimizer.model_fields_set
        return self.optimizer.model_copy(update={key: value for key, value in defaults.items() if key not in given})


def _start_config(start: str) -> ModelConfig:
    """Config of the model folder that training goes on from."""
    from dsv4.checkpoint import read_config  # imports torch, which a plan of a run does without

    return read_config(resolve_model(start))


def _with_layers(config: ModelConfig, layers: int) -> ModelConfig:
    """Model with another number of main layers: their kinds go on as the last two, MTP blocks keep theirs."""
    main, rest = (
        list(config.compress_ratios[: config.num_hidden_layers]),
        config.compress_ratios[config.num_hidden_layers :],
    )
    while len(main) < layers:
        main.append(main[-2] if len(main) > 1 else main[-1])
    return replace(
        config,
        num_hidden_layers=layers,
        num_hash_layers=min(config.num_hash_layers, layers),
        compress_ratios=(*main[:layers], *rest),
    )
