"""Keys of the recipes of GRPO and of distillation, with their defaults (reasons: docs/post-training.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator

from dsv4.data.stable_hash import stable_hash
from dsv4.engine import SamplingParams
from dsv4.model.transformer import Transformer
from dsv4.post_training.data_problems import Files, Rows, absolute
from dsv4.post_training.distillation import DistillationSettings, Estimate
from dsv4.post_training.domains.registry import mixed
from dsv4.post_training.effort_keys import EffortsSection
from dsv4.post_training.effort_names import asked_modes, has_budgets
from dsv4.post_training.efforts import EffortMode
from dsv4.post_training.given_texts import GivenTexts
from dsv4.post_training.grpo import AdvantageScale, GRPOSettings
from dsv4.post_training.grpo_run import GRPORunSettings
from dsv4.post_training.judge_keys import JudgeSection
from dsv4.post_training.key_types import Count, Finite, NotNegative, Unbounded, Whole
from dsv4.post_training.learner import LearnerSettings
from dsv4.post_training.length_penalty import OverlengthPenalty
from dsv4.post_training.policy_run import LoopSettings
from dsv4.post_training.problem_keys import ProblemsSection
from dsv4.post_training.problems import ProblemSource
from dsv4.post_training.replay import ReplaySettings
from dsv4.post_training.rewards import RewardSettings
from dsv4.post_training.rubric import RubricQuestion
from dsv4.post_training.rubric_judge import RubricJudge
from dsv4.post_training.run_keys import EpisodesSection, OptimizerSection, RolloutSection, RunSection, SamplingSection
from dsv4.post_training.service_keys import ServiceSection
from dsv4.tokenizer.prompts import effort_ladder
from dsv4.training.recipe import Section, changed_keys
from dsv4.training.run_shards import read_share


class PolicyRecipe(Section):
    """Keys that GRPO and distillation share."""

    problems: ProblemsSection = ProblemsSection()
    optimizer: OptimizerSection = OptimizerSection()
    sampling: SamplingSection = SamplingSection()
    episodes: EpisodesSection = EpisodesSection()
    run: RunSection = RunSection()

    def modes(self) -> tuple[EffortMode, ...]:
        """Modes that problems are asked in."""
        return tuple(map(EffortMode, asked_modes(self.problems.efforts)))

    def source(self) -> ProblemSource:
        """The problems, asked with the efforts. ValueError as of `ProblemsSection.source`."""
        return self.problems.source(self.modes())

    def resolved(self) -> Self:
        """The recipe with what its other keys decide written out."""
        return self

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
        return LoopSettings(
            steps=run.steps, schedule=self.optimizer.schedule(), prompts=sampling.prompts,
            max_tokens=sampling.max_tokens, save_every=run.save_every, seed=run.seed, seconds=run.seconds,
            max_difference=run.max_difference,
        )  # fmt: skip


class ObjectiveSection(Section):
    """The objective. Choices of a rollout that are kept: left out, where other weights than those that sampled learn
    from it, as in a second mini-batch, or where staleness is allowed."""

    group_size: Annotated[int, Field(ge=2)] = GRPORunSettings.group_size
    mini_batches: Count = GRPORunSettings.mini_batches
    resample: Count = GRPORunSettings.resample
    clip_low: Annotated[float, Field(ge=0.0, lt=1.0)] = GRPOSettings.clip_low
    clip_high: Annotated[float, Field(ge=0.0)] = GRPOSettings.clip_high
    kl: NotNegative = GRPOSettings.kl
    reference_every: Whole = GRPORunSettings.reference_every
    unbiased_kl: bool = GRPOSettings.unbiased_kl
    off_policy_bound: Unbounded | None = GRPOSettings.off_policy_bound
    advantage_scale: AdvantageScale = GRPOSettings.advantage_scale
    keep_routing: bool | None = None
    keep_indexer: bool | None = None
    keep_sampling_mask: bool = ReplaySettings.sampling_mask

    @model_validator(mode="after")
    def _check(self) -> ObjectiveSection:
        if self.reference_every and not self.kl:
            raise ValueError(f"reference_every is {self.reference_every} without kl; allowed: 0, or kl above 0")
        return self

    def replay(self, max_staleness: int) -> ReplaySettings:
        """Choices that are kept, where tokens may be `max_staleness` updates old."""
        differ = self.mini_batches > 1 or max_staleness > 0
        routing, indexer = (differ if kept is None else kept for kept in (self.keep_routing, self.keep_indexer))
        return ReplaySettings(routing=routing, indexer=indexer, sampling_mask=self.keep_sampling_mask)


class RewardSection(Section):
    """Penalties of all answers. Length: linear from `free` tokens to `window`, where it is `length`; 0: none."""

    unfinished: Finite = RewardSettings.unfinished
    language: NotNegative = RewardSettings.language  # of an answer that is in other languages than the question
    length: NotNegative = 0.0
    free: Whole = 0
    window: Whole = 0  # 0: sampling.max_tokens

    @model_validator(mode="after")
    def _check(self) -> RewardSection:
        for name in ("free", "window"):
            if getattr(self, name) and not self.length:
                raise ValueError(f"{name} is {getattr(self, name)} without length; allowed: 0, or length above 0")
        return self


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

    def resolved(self) -> Self:
        replay = self.replay
        kept = {"keep_routing": replay.routing, "keep_indexer": replay.indexer}
        return self.model_copy(update={"objective": self.objective.model_copy(update=kept)})

    @property
    def replay(self) -> ReplaySettings:
        """Choices of rollouts that training keeps."""
        return self.objective.replay(self.service.max_staleness)

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

    @model_validator(mode="after")
    def _check_difference(self) -> Self:
        if self.run.max_difference is not None and self.service.max_staleness:
            raise ValueError(
                f"run.max_difference is {self.run.max_difference:g} and service.max_staleness "
                f"{self.service.max_staleness}; allowed: one of them, since tokens of older weights differ"
            )
        return self

    def placed(self) -> Self:
        return super().placed().model_copy(update={"judge": self.judge.placed()})

    def rubric_judge(self, policy: Transformer, folder: Path) -> RubricJudge | None:
        """Judge of the run's rubric questions, with the policy's weights of now; None without such questions."""
        if not any(isinstance(row, RubricQuestion) for row in self.problems.rows()):
            return None
        run, sampling = self.run, self.sampling
        return RubricJudge(
            policy, folder, self.judge.max_tokens, run.quantized, self.judge.thinking, self.judge.form(),
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
                clip_low=objective.clip_low, clip_high=objective.clip_high, kl=objective.kl,
                unbiased_kl=objective.unbiased_kl, off_policy_bound=objective.off_policy_bound,
                advantage_scale=objective.advantage_scale,
            ),
            micro_tokens=run.micro_tokens, grad_clip=self.optimizer.grad_clip, quantized=run.quantized,
            balance=run.balance, indexer=run.indexer, recompute=run.recompute,
        )  # fmt: skip
        drawn = self.sampling
        return GRPORunSettings(
            learner=learner,
            rewards=RewardSettings(unfinished=reward.unfinished, length=penalty, language=reward.language),
            group_size=objective.group_size,
            mini_batches=objective.mini_batches,
            reference_every=objective.reference_every,
            resample=objective.resample,
            sampling=SamplingParams(
                temperature=drawn.temperature, top_p=drawn.top_p, top_k=drawn.top_k, min_p=drawn.min_p
            ),
            replay=self.replay,
            episodes=self.episodes.limits(drawn.max_model_len),
        )


class DistillationSection(Section):
    """What a step learns from. `texts`: folders of shards (FOLDER or FOLDER=SHARE) of which each step has documents of
    about `text_tokens` tokens, besides the samples; the model that the run began with, or a teacher `texts`, teaches
    them.
    """

    texts: Files = ()
    text_tokens: Annotated[int, Field(ge=2)] = 2048
    samples: Count = DistillationSettings.samples
    estimate: Estimate = DistillationSettings.estimate
    kl_chunk: Count = DistillationSettings.kl_chunk

    @field_validator("texts")
    @classmethod
    def _check_texts(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        folders = [folder for folder, _ in map(read_share, given)]
        if len({Path(folder).resolve() for folder in folders}) < len(folders):
            raise ValueError(f"texts has a folder twice: {', '.join(folders)}; allowed: once, with its share")
        return given


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

    def placed(self) -> Self:
        texts = [f"{Path(folder).absolute()}={share!r}" for folder, share in map(read_share, self.distillation.texts)]
        distillation = self.distillation.model_copy(update={"texts": tuple(texts)})
        return super().placed().model_copy(update={"distillation": distillation})

    def texts(self, model: Path) -> GivenTexts | None:
        """Texts of each step, for the model in a folder; None without any. ShardError for other tokens than its own."""
        shares = {Path(folder): share for folder, share in map(read_share, self.distillation.texts)}
        return GivenTexts(shares, self.distillation.text_tokens, model, self.run.seed) if shares else None

    def settings(self) -> DistillationSettings:
        one, run = self.distillation, self.run
        return DistillationSettings(
            samples=one.samples, estimate=one.estimate, temperature=self.sampling.temperature,
            kl_chunk=one.kl_chunk, micro_tokens=run.micro_tokens,
            grad_clip=self.optimizer.grad_clip, quantized=run.quantized, balance=run.balance, indexer=run.indexer,
            recompute=run.recompute, episodes=self.episodes.limits(self.sampling.max_model_len),
        )  # fmt: skip
