"""Keys of the recipes of GRPO and of distillation, with their defaults (reasons: docs/post-training.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from rich.console import Console

from dsv4.analysis.activations import Recompute
from dsv4.config import ModelConfig
from dsv4.data.stable_hash import stable_hash
from dsv4.engine import SamplingParams
from dsv4.model.transformer import Transformer
from dsv4.post_training.data_problems import Rows, absolute
from dsv4.post_training.distillation import DistillationSettings, Estimate
from dsv4.post_training.domains.registry import mixed
from dsv4.post_training.effort_keys import EffortsSection
from dsv4.post_training.effort_names import asked_efforts, has_budgets
from dsv4.post_training.efforts import EffortMode
from dsv4.post_training.episodes.environment import EpisodeLimits
from dsv4.post_training.grpo import AdvantageScale, GRPOSettings
from dsv4.post_training.grpo_run import GRPORunSettings
from dsv4.post_training.judge_keys import JudgeSection
from dsv4.post_training.learner import LearnerSettings
from dsv4.post_training.length_penalty import OverlengthPenalty
from dsv4.post_training.policy_run import LoopSettings
from dsv4.post_training.problem_keys import ProblemsSection
from dsv4.post_training.problems import ProblemSource
from dsv4.post_training.replay import ReplaySettings
from dsv4.post_training.rewards import RewardSettings
from dsv4.post_training.rollout_service.launchers import LauncherName, ProcessLauncher
from dsv4.post_training.rollout_service.process import WorkerPlan
from dsv4.post_training.rollout_service.service import RolloutService, ServiceSettings, run_name, worker_threads
from dsv4.post_training.rubric import RubricQuestion
from dsv4.post_training.rubric_judge import RubricJudge
from dsv4.tokenizer.prompts import effort_ladder
from dsv4.training.newton_schulz import product_dtype
from dsv4.training.optim import MuonAdamW
from dsv4.training.recipe import Section, changed_keys
from dsv4.training.schedule import Schedule

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NotNegative = Annotated[float, Field(ge=0.0)]
MAX_STALLED = 5  # workers that may end on a rollout without a further token of it


class OptimizerSection(Section):
    rate: Positive = 1e-4
    warmup_steps: Annotated[int, Field(ge=0)] = 5
    decay_fraction: Share = 0.0
    final_ratio: Share = 0.1
    weight_decay: NotNegative = 0.0
    momentum: Share = 0.95
    grad_clip: Positive = 1.0

    def schedule(self) -> Schedule:
        return Schedule(self.rate, self.warmup_steps, self.decay_fraction, self.final_ratio)

    def optimizer(self, model: Transformer, config: ModelConfig) -> MuonAdamW:
        """Optimizer of the parameters that take a gradient."""
        return MuonAdamW(
            model, config, momentum=self.momentum, weight_decay=self.weight_decay,
            compute_dtype=product_dtype(model.device),
        )  # fmt: skip


class SamplingSection(Section):
    prompts: Count = 16  # per step
    max_tokens: Count = 512  # of an answer
    max_num_seqs: Count = 32  # of the engine at a time
    max_model_len: Count = 2048


class RolloutSection(SamplingSection):
    """Sampling of rollouts: how tokens are drawn, too."""

    temperature: Positive = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0  # 0: no limit
    min_p: Share = 0.0


class RunSection(Section):
    steps: Count = 100
    seconds: Positive | None = None  # length of the run in place of `steps`
    seed: int = 1
    device: str = "cpu"
    numerics: Literal["float", "shipped"] = "float"
    quantized: bool = True  # sampling and training compute with the stored (FP4, FP8) weight values
    save_every: Count = 10
    micro_tokens: Count = 8192
    recompute: Recompute = "none"  # parts of the model that run again in the backward
    balance: NotNegative = 1e-4
    indexer: NotNegative = 1.0
    train_router: bool = False  # False: router weights keep their values


class EpisodesSection(Section):
    """Limits of episodes with tools; sampling.max_tokens is of one turn, sampling.max_model_len of the whole."""

    turns: Count = 8
    tokens: Count | None = None  # that are sampled; left out: as many as the context holds
    calls: Count = 8
    at_once: Count = 64

    def limits(self, context: int) -> EpisodeLimits:
        """The limits within `context` tokens of an episode, its prompt and results included."""
        return EpisodeLimits(self.turns, self.tokens or context, self.calls, at_once=self.at_once)


class PolicyRecipe(Section):
    """Keys that GRPO and distillation share."""

    problems: ProblemsSection = ProblemsSection()
    optimizer: OptimizerSection = OptimizerSection()
    sampling: SamplingSection = SamplingSection()
    episodes: EpisodesSection = EpisodesSection()
    run: RunSection = RunSection()

    def modes(self) -> tuple[EffortMode, ...]:
        """Modes of the efforts that are asked."""
        return tuple(map(EffortMode, asked_efforts(self.problems.efforts)))

    def source(self) -> ProblemSource:
        """The problems, asked with the efforts. ValueError as of `ProblemsSection.source`."""
        return self.problems.source(self.modes())

    def for_model(self, folder: Path) -> Self:
        """The recipe for the model in `folder`, whose ladder decides which efforts of rows can be asked."""
        return self.model_copy(update={"problems": self.problems.under(effort_ladder(folder))})

    def files(self) -> tuple[str, ...]:
        """Files of the user that the run reads."""
        return self.problems.data

    def placed(self) -> Self:
        """The recipe with files that mean the same in any folder."""
        problems = self.problems.model_copy(update={"data": absolute(self.problems.data)})
        return self.model_copy(update={"problems": problems})

    def loop(self) -> LoopSettings:
        sampling, run = self.sampling, self.run
        schedule = self.optimizer.schedule()
        return LoopSettings(
            run.steps, schedule, sampling.prompts, sampling.max_tokens, run.save_every, run.seed, run.seconds
        )


class ObjectiveSection(Section):
    group_size: Annotated[int, Field(ge=2)] = 8
    mini_batches: Count = 2
    resample: Count = 3
    clip_low: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.2
    clip_high: NotNegative = 0.28
    kl: NotNegative = 0.0
    unbiased_kl: bool = True
    off_policy_bound: Positive | None = 0.5
    advantage_scale: AdvantageScale = "none"
    keep_routing: bool = False
    keep_indexer: bool = False
    keep_sampling_mask: bool = True


class RewardSection(Section):
    """Length penalty of all answers: linear from `free` tokens to `window`, where it is `length`; 0: none."""

    unfinished: float = 0.0
    length: NotNegative = 0.0
    free: Annotated[int, Field(ge=0)] = 0
    window: Annotated[int, Field(ge=0)] = 0  # 0: sampling.max_tokens

    @model_validator(mode="after")
    def _check(self) -> RewardSection:
        for name in ("free", "window"):
            if getattr(self, name) and not self.length:
                raise ValueError(f"{name} is {getattr(self, name)} without length; allowed: 0, or length above 0")
        return self


class ServiceSection(Section):
    """Sampling by workers in processes of their own, from a durable queue; without workers, the run's own engine.

    `sampling.max_num_seqs` is of each worker.
    """

    workers: Annotated[int, Field(ge=0)] = 0
    url: str | None = None  # of the queue's database; left out: an SQLite file in the run's folder
    max_staleness: Annotated[int, Field(ge=0)] = 0  # updates of the workers' weights; 0: synchronous
    launcher: LauncherName = "process"
    address: str = "local"  # of the Ray cluster
    threads: Annotated[int, Field(ge=0)] = 0  # of a worker; 0: this machine's processors shared among them
    lease_seconds: Positive = 60.0  # that a worker may be silent
    silence_seconds: Positive = 600.0  # that the learner waits for a token of any worker
    max_deaths: Count = 10  # of workers, without a token in between

    @model_validator(mode="after")
    def _check(self) -> ServiceSection:
        if not self.workers and (given := changed_keys(self)):
            value = getattr(self, given[0])
            raise ValueError(f"{given[0]} is {value} without workers; allowed: left out, or workers above 0")
        return self

    def service(self, recipe: PolicyRecipe, folder: Path, run_dir: Path, console: Console) -> RolloutService | None:
        """The service of a run of the model in `folder`; None without workers. ServiceError for a queue that cannot be
        used, ClusterError for a Ray cluster."""
        if not self.workers:
            return None
        place = (run_dir / "service").absolute()
        plan = WorkerPlan(
            "", run_name(place), self.url or f"sqlite:///{place / 'queue.db'}", str(place / "weights"), str(folder),
            recipe.run.numerics, recipe.run.quantized, recipe.run.device, recipe.sampling.max_num_seqs,
            recipe.sampling.max_model_len, self.lease_seconds, MAX_STALLED, self.workers,
            silence_seconds=self.silence_seconds,
        )  # fmt: skip
        threads = self.threads or worker_threads(self.workers)
        settings = ServiceSettings(self.workers, self.max_staleness, self.max_deaths, self.silence_seconds)
        launcher = ProcessLauncher(place, threads)
        if self.launcher == "ray":
            from dsv4.post_training.rollout_service.ray_launcher import RayLauncher

            launcher = RayLauncher(self.address, self.workers, threads, recipe.run.device.startswith("cuda"))
        return RolloutService(plan, settings, launcher, console)


class GRPORecipe(PolicyRecipe):
    """A GRPO run."""

    sampling: RolloutSection = RolloutSection()
    objective: ObjectiveSection = ObjectiveSection()
    reward: RewardSection = RewardSection()
    efforts: EffortsSection = EffortsSection()
    judge: JudgeSection = JudgeSection()
    service: ServiceSection = ServiceSection()

    @model_validator(mode="after")
    def _check(self) -> GRPORecipe:
        if self.reward.length and self.problems.efforts and self.efforts.penalty != "none":
            raise ValueError(
                f"reward.length is {self.reward.length} with efforts, which have penalties of their own; "
                "allowed: one of the two"
            )
        if self.efforts.penalty == "mode" and has_budgets(self.problems.efforts):
            raise ValueError("efforts.penalty is mode, and problems.efforts has budgets; allowed: budget, none")
        return self

    def modes(self) -> tuple[EffortMode, ...]:
        return self.efforts.modes(self.problems.efforts, self.sampling.max_tokens)

    def source(self) -> ProblemSource:
        """The problems, and labelled judgements, which are asked without efforts, as the judge is.

        ValueError for keys of efforts where none is asked: only here, since a recipe of stages fills problems in later.
        """
        if not self.problems.efforts and (given := changed_keys(self.efforts)):
            raise ValueError(
                f"efforts.{given[0]} without efforts that are asked; allowed: with problems.efforts, "
                """as in problems.efforts='["low", "high", "max"]'"""
            )
        if not self.judge.data:
            return super().source()
        problems, seed = self.problems, self.problems.seed
        parts = [(super().source(), problems.total_weight)] if problems.total_weight else []
        other = stable_hash("judgements", seed)  # a draw of its own: the problems may be a mixture, too
        return mixed([*parts, (Rows(self.judge.judgements(), seed), self.judge.weight)], other)

    def files(self) -> tuple[str, ...]:
        return self.problems.data + self.judge.data

    def placed(self) -> Self:
        return super().placed().model_copy(update={"judge": self.judge.placed()})

    def rubric_judge(self, policy: Transformer, folder: Path) -> RubricJudge | None:
        """Judge of the run's rubric questions, with the policy's weights of now; None without such questions."""
        if not any(isinstance(row, RubricQuestion) for row in self.problems.rows()):
            return None
        run, sampling = self.run, self.sampling
        return RubricJudge(
            policy, folder, self.judge.max_tokens, run.quantized, self.judge.thinking,
            max_num_seqs=sampling.max_num_seqs, max_model_len=sampling.max_model_len, device=run.device,
        )  # fmt: skip

    def settings(self) -> GRPORunSettings:
        """Settings of the run. ValueError for a length penalty without room."""
        objective, reward, run = self.objective, self.reward, self.run
        penalty = None
        if reward.length:
            window = reward.window or self.sampling.max_tokens
            penalty = OverlengthPenalty(window, reward.free, reward.length).reward
        learner = LearnerSettings(
            GRPOSettings(
                objective.clip_low, objective.clip_high, objective.kl, objective.unbiased_kl,
                objective.off_policy_bound, objective.advantage_scale,
            ),
            run.micro_tokens, self.optimizer.grad_clip, run.quantized, run.balance, run.indexer, run.recompute,
        )  # fmt: skip
        rewards = RewardSettings(reward.unfinished, length=penalty)
        drawn = self.sampling
        return GRPORunSettings(
            learner, rewards, objective.group_size, objective.mini_batches, objective.resample,
            SamplingParams(temperature=drawn.temperature, top_p=drawn.top_p, top_k=drawn.top_k, min_p=drawn.min_p),
            ReplaySettings(objective.keep_routing, objective.keep_indexer, objective.keep_sampling_mask),
            self.episodes.limits(drawn.max_model_len),
        )  # fmt: skip


class DistillationSection(Section):
    samples: Count = 1
    estimate: Estimate = "full"
    kl_chunk: Count = 1024


class DistillRecipe(PolicyRecipe):
    """A distillation run; its teachers are arguments of the command."""

    distillation: DistillationSection = DistillationSection()
    service: ServiceSection = ServiceSection()

    @model_validator(mode="after")
    def _check(self) -> DistillRecipe:
        if self.service.max_staleness:
            raise ValueError(
                f"service.max_staleness is {self.service.max_staleness} in distillation, which samples with the "
                "weights of now; allowed: 0"
            )
        return self

    def source(self) -> ProblemSource:
        """As of PolicyRecipe; rows need no answer, for teachers judge them."""
        return self.problems.source(self.modes(), rewarded=False)

    def settings(self) -> DistillationSettings:
        one, run = self.distillation, self.run
        return DistillationSettings(
            one.samples, one.estimate, one.kl_chunk, run.micro_tokens, self.optimizer.grad_clip, run.quantized,
            run.balance, run.indexer, self.episodes.limits(self.sampling.max_model_len), run.recompute,
        )  # fmt: skip
