"""Keys of a run that samples and learns: GRPO and distillation, with defaults (reasons: docs/post-training.md)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dsv4.analysis.activations import Recompute
from dsv4.config import ModelConfig
from dsv4.model.transformer import Transformer
from dsv4.post_training.episodes.environment import EpisodeLimits
from dsv4.post_training.key_types import Count, NotNegative, Positive, Share, Whole
from dsv4.post_training.policy_run import LoopSettings
from dsv4.post_training.updates import UpdateSettings
from dsv4.training.newton_schulz import product_dtype
from dsv4.training.optim import MuonAdamW
from dsv4.training.recipe import Section
from dsv4.training.schedule import Schedule


class OptimizerSection(Section):
    kind: Literal["muon", "adamw"] = "muon"  # of matrices; AdamW for all else
    rate: Positive = 1e-4
    warmup_steps: Whole = 5
    decay_fraction: Share = 0.0
    final_ratio: Share = 0.1
    weight_decay: NotNegative = 0.0
    momentum: Share = 0.95  # Muon's
    grad_clip: Positive = UpdateSettings.grad_clip

    def schedule(self) -> Schedule:
        return Schedule(self.rate, self.warmup_steps, self.decay_fraction, self.final_ratio)

    def optimizer(self, model: Transformer, config: ModelConfig) -> MuonAdamW:
        """Optimizer of the parameters that take a gradient."""
        return MuonAdamW(
            model, config, momentum=self.momentum, weight_decay=self.weight_decay,
            compute_dtype=product_dtype(model.device), matrices=self.kind,
        )  # fmt: skip


class SamplingSection(Section):
    prompts: Count = LoopSettings.prompts  # per step
    max_tokens: Count = LoopSettings.max_tokens  # of an answer
    max_num_seqs: Count = 32  # of the engine at a time
    max_model_len: Count = 2048
    temperature: Positive = 1.0


class RolloutSection(SamplingSection):
    """Sampling of rollouts, which may leave tokens out."""

    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: Whole = 0  # 0: no limit
    min_p: Share = 0.0


class RunSection(Section):
    steps: Count = 100
    seconds: Positive | None = None  # length of the run in place of `steps`
    seed: int = LoopSettings.seed
    device: str = "cpu"
    numerics: Literal["float", "shipped"] = "float"  # of all models of the run; shipped: with the indexer in FP4
    quantized: bool = UpdateSettings.quantized  # all models compute with the stored (FP4, FP8) weight values
    save_every: Count = LoopSettings.save_every
    max_difference: NotNegative | None = None  # training against engine, past which the run stops
    micro_tokens: Count = UpdateSettings.micro_tokens
    recompute: Recompute = UpdateSettings.recompute  # parts of the model that run again in the backward
    balance: NotNegative = UpdateSettings.balance
    indexer: NotNegative = UpdateSettings.indexer
    train_router: bool = False  # False: router weights keep their values


class EpisodesSection(Section):
    """Limits of episodes with tools; sampling.max_tokens is of one turn, sampling.max_model_len of the whole."""

    turns: Count = EpisodeLimits.turns
    tokens: Count | None = None  # that are sampled; left out: as many as the context holds
    calls: Count = EpisodeLimits.calls
    at_once: Count = EpisodeLimits.at_once

    def limits(self, context: int) -> EpisodeLimits:
        """The limits within `context` tokens of an episode, its prompt and results included."""
        return EpisodeLimits(
            turns=self.turns, tokens=self.tokens or context, calls=self.calls, at_once=self.at_once
        )  # fmt: skip
