"""GRPO: groups of rollouts by the engine, rewards, updates; a killed run resumes to the same bits."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from rich.console import Console

from dsv4.checkpoint.atomic import clear_folder
from dsv4.data.stable_hash import stable_hash
from dsv4.engine import LLM, SamplingParams
from dsv4.model.transformer import Transformer
from dsv4.post_training.grpo import advantages
from dsv4.post_training.learner import Judged, LearnerSettings, Update, update, with_reference
from dsv4.post_training.problems import Problem, ProblemSource
from dsv4.post_training.rewards import Reward, RewardSettings, judge
from dsv4.post_training.rollouts import Rollout, sample_rollouts
from dsv4.post_training.served_policy import ServedPolicy
from dsv4.training.optim import MuonAdamW
from dsv4.training.report import Report
from dsv4.training.schedule import Schedule
from dsv4.training.state import load_state, save_state
from dsv4.training.stopping import RunStoppedError, StopOnSigterm

STATE = "state.pt"


@dataclass(frozen=True)
class GRPORunSettings:
    """Settings of a run; the report gives no values."""

    steps: int
    schedule: Schedule
    learner: LearnerSettings
    rewards: RewardSettings
    prompts: int = 16  # groups per step
    group_size: int = 8
    mini_batches: int = 2  # updates per step
    max_tokens: int = 512  # of an answer
    resample: int = 3  # rounds of new prompts at most, in place of groups whose rewards are equal
    save_every: int = 10
    seed: int = 1

    def __post_init__(self) -> None:
        for name in ("steps", "prompts", "mini_batches", "max_tokens", "resample", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: 1 or more")
        if self.group_size < 2:
            raise ValueError(f"group_size is {self.group_size}; allowed: 2 or more, for an advantage is within a group")


@dataclass
class GRPOPosition:
    """Position of a run."""

    step: int = 0
    problems: int = 0  # that were asked
    tokens: int = 0  # that were sampled
    seconds: float = 0.0


@dataclass(frozen=True)
class Group:
    """Rollouts of one problem and their rewards; those without a reward are left out."""

    problem: Problem
    rollouts: list[Rollout]
    rewards: list[Reward]

    @property
    def informative(self) -> bool:
        """True if the rewards differ: else every advantage is 0."""
        return len({reward.value for reward in self.rewards}) > 1


class GRPORun:
    """Trains a served policy on problems. `run_dir` keeps state and metrics; a state found there is resumed."""

    def __init__(
        self,
        policy: ServedPolicy,
        optimizer: MuonAdamW,
        problems: ProblemSource,
        settings: GRPORunSettings,
        run_dir: Path,
        reference: Transformer | None = None,
        console: Console | None = None,
        quiet: bool = False,
    ) -> None:
        if settings.learner.objective.kl and reference is None:
            raise ValueError(f"kl is {settings.learner.objective.kl}, but there is no reference policy; allowed: 0")
        self.policy, self.optimizer, self.problems, self.settings = policy, optimizer, problems, settings
        self.run_dir, self.reference = run_dir, reference
        self.console, self.quiet = console or Console(), quiet
        self.position = GRPOPosition()
        run_dir.mkdir(parents=True, exist_ok=True)
        clear_folder(run_dir)
        if self.state_path.exists():
            self.position = load_state(self.state_path, policy.model, optimizer, GRPOPosition)

    @property
    def state_path(self) -> Path:
        return self.run_dir / STATE

    def run(self, stop_after: int | None = None) -> GRPOPosition:
        """Train to the last step, or until `stop_after` steps are done; saves the state at the end.

        RunStoppedError, with the state saved, if the process got SIGTERM meanwhile.
        """
        settings, position = self.settings, self.position
        last = settings.steps if stop_after is None else min(settings.steps, stop_after)
        metrics = self.run_dir / "metrics.jsonl"
        with Report(metrics, position.step, self.console, self.quiet) as report, StopOnSigterm() as stop:
            while position.step < last and not stop.requested:
                self._step(report)
                if position.step % settings.save_every == 0:
                    self.save()
        self.save()
        if stop.requested and position.step < settings.steps:
            raise RunStoppedError(
                f"stopped by SIGTERM after step {position.step} of {settings.steps}; the state is saved in "
                f"{self.state_path}"
            )
        return position

    def save(self) -> None:
        save_state(self.state_path, self.policy.model, self.optimizer, self.position)

    def _step(self, report: Report) -> None:
        started = time.perf_counter()
        settings, position = self.settings, self.position
        with self.policy.serving() as llm:
            asked = list(self._groups(llm))
        sampled = time.perf_counter() - started
        rate = settings.schedule.rate(position.step, settings.steps)
        updates = list(self._update([group for group in asked if group.informative], rate))
        took = time.perf_counter() - started
        tokens = sum(len(rollout.token_ids) for group in asked for rollout in group.rollouts)
        step = position.step
        position.step, position.tokens, position.seconds = step + 1, position.tokens + tokens, position.seconds + took
        metrics: dict[str, Any] = {
            "step": step, "stage": "grpo", "lr": rate, "seconds": round(position.seconds, 3),
            "tokens_per_second": tokens / took, "sampling_share": sampled / took,
        } | _sampling_figures(asked) | _update_figures(updates)  # fmt: skip
        report.step(metrics, settings.steps, True, (settings.steps - position.step) * position.seconds / position.step)

    def _groups(self, llm: LLM) -> Iterator[Group]:
        """Groups of this step: until `prompts` of them are informative, or the rounds are used up."""
        settings = self.settings
        wanted = settings.prompts
        for _ in range(settings.resample):
            groups = self._ask(llm, wanted)
            yield from groups
            wanted -= sum(group.informative for group in groups)
            if wanted <= 0:
                return

    def _ask(self, llm: LLM, count: int) -> list[Group]:
        """Ask the next `count` problems, each `group_size` times."""
        settings, position = self.settings, self.position
        assert llm.prompts is not None, "problems are asked in text"
        first = position.problems
        problems = [self.problems.problem(number) for number in range(first, first + count)]
        position.problems += count
        prompts = [llm.prompts.encode(problem.prompt()) for problem in problems]
        seed = stable_hash("rollouts", settings.seed, first) >> 2
        rollouts = sample_rollouts(
            llm, prompts, settings.group_size, SamplingParams(max_tokens=settings.max_tokens), seed
        )
        rewards = judge(rollouts, problems, settings.rewards)
        for error in sorted({reward.error for reward in rewards if reward.error is not None}):
            self.console.print(f"{error}; its rollouts are left out", highlight=False)
        pairs = [list[tuple[Rollout, Reward]]() for _ in problems]
        for rollout, reward in zip(rollouts, rewards, strict=True):
            if reward.error is None:
                pairs[rollout.prompt].append((rollout, reward))
        return [
            Group(problem, [rollout for rollout, _ in judged], [reward for _, reward in judged])
            for problem, judged in zip(problems, pairs, strict=True)
        ]

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
        Random(stable_hash("mini-batches", settings.seed, self.position.step)).shuffle(batch)
        size = -(-len(batch) // settings.mini_batches)
        for start in range(0, len(batch), max(1, size)):
            yield update(self.policy.model, self.optimizer, batch[start : start + size], rate, settings.learner)


def _sampling_figures(groups: Sequence[Group]) -> dict[str, Any]:
    rewards = [reward for group in groups for reward in group.rewards]
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    count = max(1, len(rewards))
    return {
        "reward": sum(reward.value for reward in rewards) / count,
        "accuracy": sum(reward.correct for reward in rewards) / count,
        "answer_tokens": sum(len(rollout.token_ids) for rollout in rollouts) / count,
        "unfinished": sum(not rollout.finished for rollout in rollouts) / count,
        "groups": len(groups),
        "informative": sum(group.informative for group in groups),
        "problems": sorted({group.problem.domain for group in groups}),
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
