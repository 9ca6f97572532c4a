"""GRPO: groups of rollouts by the engine, rewards, updates."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

from rich.console import Console

from dsv4.data.stable_hash import stable_hash
from dsv4.engine import LLM, SamplingParams
from dsv4.model.transformer import Transformer
from dsv4.post_training.episodes.environment import EpisodeLimits, EpisodeProblem
from dsv4.post_training.episodes.sampling import sample_episodes
from dsv4.post_training.episodes.trajectory import TrajectoryFiles
from dsv4.post_training.grpo import advantages
from dsv4.post_training.learner import Judged, LearnerSettings, Update, update, with_reference
from dsv4.post_training.policy_run import LoopSettings, PolicyRun, StepFigures
from dsv4.post_training.problems import Problem, ProblemSource
from dsv4.post_training.replay import ReplaySettings, record_choices
from dsv4.post_training.rewards import Reward, RewardSettings, judge
from dsv4.post_training.rollouts import Sampled, sample_rollouts
from dsv4.post_training.rubric_judge import RubricJudge
from dsv4.post_training.served_policy import ServedPolicy
from dsv4.training.optim import MuonAdamW


@dataclass(frozen=True)
class GRPORunSettings:
    """Settings of a run besides its loop; the report gives no values."""

    learner: LearnerSettings
    rewards: RewardSettings
    group_size: int = 8
    mini_batches: int = 2  # updates per step
    resample: int = 3  # rounds of new prompts at most, in place of groups whose rewards are equal
    sampling: SamplingParams = field(default_factory=SamplingParams)  # temperature and filters
    replay: ReplaySettings = field(default_factory=ReplaySettings)
    episodes: EpisodeLimits = field(default_factory=EpisodeLimits)

    def __post_init__(self) -> None:
        for name in ("mini_batches", "resample"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: 1 or more")
        if self.group_size < 2:
            raise ValueError(f"group_size is {self.group_size}; allowed: 2 or more, for an advantage is within a group")
        _ = self.params  # which checks the temperature

    @property
    def params(self) -> SamplingParams:
        """Parameters of the rollouts; log-probabilities are of the distribution that training computes them of."""
        return replace(self.sampling, logprobs_mode=self.replay.logprobs_mode)


@dataclass(frozen=True)
class Group:
    """Rollouts of one problem and their rewards; those without a reward are left out."""

    problem: Problem
    rollouts: list[Sampled]
    rewards: list[Reward]

    @property
    def informative(self) -> bool:
        """True if the rewards differ: else every advantage is 0."""
        return len({reward.value for reward in self.rewards}) > 1


class GRPORun(PolicyRun):
    """Trains a policy by GRPO. `reference`: a frozen policy that the KL is to; needed unless its weight is 0.

    `rubric_judge`: judges rubric questions; it follows the policy, a step behind.
    """

    stage = "grpo"

    def __init__(
        self,
        policy: ServedPolicy,
        optimizer: MuonAdamW,
        problems: ProblemSource,
        loop: LoopSettings,
        settings: GRPORunSettings,
        run_dir: Path,
        reference: Transformer | None = None,
        rubric_judge: RubricJudge | None = None,
        console: Console | None = None,
        quiet: bool = False,
    ) -> None:
        if settings.learner.objective.kl and reference is None:
            raise ValueError(f"kl is {settings.learner.objective.kl}, but there is no reference policy; allowed: 0")
        super().__init__(policy, optimizer, problems, loop, run_dir, console, quiet)
        self.settings, self.reference, self.rubric_judge = settings, reference, rubric_judge

        if rubric_judge is not None and self.position.step:
            rubric_judge.load(self._judge_path())

    def save(self) -> None:
        """Write the state; first the judge's weights, of whose files only that of the last state stays."""
        judge = self._judge_path()
        if self.rubric_judge is not None:
            self.rubric_judge.save(judge)
        super().save()
        for path in self.run_dir.glob("judge-*.safetensors"):
            if path != judge:
                path.unlink()

    def _judge_path(self) -> Path:
        return self.run_dir / f"judge-{self.position.step}.safetensors"

    def step(self, rate: float) -> StepFigures:
        started = time.perf_counter()
        self._files = TrajectoryFiles(self.run_dir / "episodes")
        with self.policy.serving() as llm:
            asked = list(self._groups(llm))
        if self.rubric_judge is not None:
            self.rubric_judge.follow(self.policy.model)
        sampling = time.perf_counter() - started
        for group in asked:
            if not group.informative:
                for rollout in group.rollouts:
                    rollout.release()
        updates = list(self._update([group for group in asked if group.informative], rate))
        tokens = sum(rollout.num_tokens for group in asked for rollout in group.rollouts)
        figures = {"sampling_seconds": round(sampling, 3)} | _sampling_figures(asked) | _update_figures(updates)
        if updates:
            figures |= self._replay_figures(updates[0])
        return StepFigures(figures, tokens)

    def _replay_figures(self, first: Update) -> dict[str, int]:
        """Recorded choices that training would not have made, in the first update, whose weights sampled."""
        replay, figures = self.settings.replay, dict[str, int]()
        if replay.routing:
            figures["routing_differences"] = first.routing_differences
        if replay.indexer:
            figures["indexer_differences"] = first.indexer_differences
        return figures

    def _groups(self, llm: LLM) -> Iterator[Group]:
        """Groups of this step: until `prompts` of them are informative, or the rounds are used up."""
        wanted = self.loop.prompts
        for _ in range(self.settings.resample):
            groups = self._ask(llm, wanted)
            yield from groups
            wanted -= sum(group.informative for group in groups)
            if wanted <= 0:
                return

    def _ask(self, llm: LLM, count: int) -> list[Group]:
        """Ask the next `count` problems, each `group_size` times."""
        first, problems, prompts = self.take_problems(llm, count)
        params = replace(self.settings.params, max_tokens=self.loop.max_tokens)
        seed = stable_hash("rollouts", self.loop.seed, first) >> 2
        rollouts = self._sample(llm, problems, prompts, params, seed)
        rewards = judge(rollouts, problems, self.settings.rewards, self.rubric_judge)
        for error in sorted({reward.error for reward in rewards if reward.error is not None}):
            self.console.print(f"{error}; its rollouts are left out", highlight=False)
        pairs = [list[tuple[Sampled, Reward]]() for _ in problems]
        for rollout, reward in zip(rollouts, rewards, strict=True):
            if reward.error is None:
                pairs[rollout.prompt].append((rollout, reward))
            else:
                rollout.release()
        return [
            Group(problem, [rollout for rollout, _ in judged], [reward for _, reward in judged])
            for problem, judged in zip(problems, pairs, strict=True)
        ]

    def _sample(
        self, llm: LLM, problems: Sequence[Problem], prompts: Sequence[list[int]], params: SamplingParams, seed: int
    ) -> list[Sampled]:
        """Answers to each problem; whole episodes of those with an environment."""
        size = self.settings.group_size
        goals = [(place, problem) for place, problem in enumerate(problems) if isinstance(problem, EpisodeProblem)]
        asked = [place for place in range(len(problems)) if place not in dict(goals)]
        found: list[Sampled] = []
        if asked:
            answers = sample_rollouts(llm, [prompts[place] for place in asked], size, params, seed)
            answers = record_choices(
                self.policy.model, answers, self.settings.learner.micro_tokens, self.settings.replay
            )
            found += [replace(answer, prompt=asked[answer.prompt]) for answer in answers]
        if goals:
            self._check_episodes(params)
            params = replace(params, logprobs_mode="raw_logprobs")
            found += sample_episodes(llm, goals, size, params, seed, self.settings.episodes, self._files)
        return found

    def _check_episodes(self, params: SamplingParams) -> None:
        """ValueError for settings that episodes do not go with."""
        replay = self.settings.replay
        if (params.temperature, params.top_p, params.top_k, params.min_p) != (1.0, 1.0, 0, 0.0):
            raise ValueError("sampling has a temperature or filters, and a problem is an episode; allowed: neither")
        if replay.routing or replay.indexer:
            raise ValueError("keep_routing or keep_indexer is set, and a problem is an episode; allowed: neither")

    def _update(self, groups: Sequence[Group], rate: float) -> Iterator[Update]:
        """Update in mini-batches of shuffled rollouts."""
        settings = self.settings
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        owners = [place for place, group in enumerate(groups) for _ in group.rollouts]
        values = [reward.value for group in groups for reward in group.rewards]
        gains = advantages(values, owners, settings.learner.objective.advantage_scale)
        references: Sequence[tuple[float, ...] | None] = [None] * len(rollouts)
        if self.reference is not None and rollouts:
            references = with_reference(self.reference, rollouts, settings.learner.micro_tokens)
        batch = [Judged(*one) for one in zip(rollouts, gains, references, strict=True)]
        Random(stable_hash("mini-batches", self.loop.seed, self.position.step)).shuffle(batch)
        size = max(1, -(-len(batch) // settings.mini_batches))
        for start in range(0, len(batch), size):
            mini_batch = batch[start : start + size]
            yield update(self.policy.model, self.optimizer, mini_batch, rate, settings.learner)
            for judged in mini_batch:
                judged.rollout.release()


def _sampling_figures(groups: Sequence[Group]) -> dict[str, Any]:
    rewards = [reward for group in groups for reward in group.rewards]
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    count = max(1, len(rewards))
    return {
        "reward": sum(reward.value for reward in rewards) / count,
        "accuracy": sum(reward.correct for reward in rewards) / count,
        "answer_tokens": sum(rollout.num_tokens for rollout in rollouts) / count,
        "unfinished": sum(not rollout.finished for rollout in rollouts) / count,
        "groups": len(groups),
        "informative": sum(group.informative for group in groups),
    }


def _update_figures(updates: Sequence[Update]) -> dict[str, Any]:
    """Figures of a step's updates. train_serve_difference is the first one's, whose weights sampled the rollouts."""
    if not updates:
        return {"loss": 0.0, "grad_norm": 0.0, "kl": 0.0, "clipped": 0.0, "dropped": 0, "updates": 0}
    mean = 1 / len(updates)
    return {
        "loss": mean * sum(one.loss for one in updates),
        "grad_norm": mean * sum(one.grad_norm for one in updates),
        "kl": mean * sum(one.kl for one in updates),
        "clipped": mean * sum(one.clipped for one in updates),
        "dropped": sum(one.dropped for one in updates),
        "updates": len(updates),
        "train_serve_difference": updates[0].largest_difference,
    }
