"""GRPO: groups of rollouts by the engine, rewards, updates."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any, TypeVar, cast

from rich.console import Console

from dsv4.data.stable_hash import stable_hash
from dsv4.engine import SamplingParams
from dsv4.model.transformer import Transformer
from dsv4.post_training.asking import Episodes, ask
from dsv4.post_training.episodes.environment import EpisodeLimits
from dsv4.post_training.episodes.trajectory import TrajectoryFiles
from dsv4.post_training.groups import Asked, Group, sampling_figures, update_figures
from dsv4.post_training.grpo import advantages
from dsv4.post_training.learner import Judged, LearnerSettings, Update, update, with_reference
from dsv4.post_training.policy_run import LoopSettings, PolicyRun, StepFigures
from dsv4.post_training.problems import Problem, ProblemSource
from dsv4.post_training.reference import ReferencePolicy
from dsv4.post_training.replay import ReplaySettings
from dsv4.post_training.rewards import Reward, RewardSettings, judge
from dsv4.post_training.rollout_service.lookahead import Lookahead
from dsv4.post_training.rollout_service.service import RolloutService
from dsv4.post_training.rollout_service.staleness import staleness
from dsv4.post_training.rollouts import Sampled, Sampler
from dsv4.post_training.rubric_judge import RubricJudge
from dsv4.post_training.served_policy import ServedPolicy
from dsv4.post_training.updates import UpdateError
from dsv4.training.optim import MuonAdamW

SHOWN_ERRORS = 5  # of a round's rewards
T = TypeVar("T")


@dataclass(frozen=True)
class GRPORunSettings:
    """Settings of a run besides its loop; the report gives no values."""

    learner: LearnerSettings
    rewards: RewardSettings
    group_size: int = 8
    mini_batches: int = 2  # updates per step
    _: KW_ONLY
    reference_every: int = 0  # steps between two in which the reference becomes the policy; 0: it stays
    resample: int = 3  # rounds of new prompts at most, in place of groups whose rewards are equal
    sampling: SamplingParams = field(default_factory=SamplingParams)  # temperature and filters
    replay: ReplaySettings = field(default_factory=ReplaySettings)
    episodes: EpisodeLimits = field(default_factory=EpisodeLimits)

    def __post_init__(self) -> None:
        for name in ("mini_batches", "resample"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: 1 or more")
        if self.reference_every < 0:
            raise ValueError(f"reference_every is {self.reference_every}; allowed: 0 (never), or more")
        if self.group_size < 2:
            raise ValueError(f"group_size is {self.group_size}; allowed: 2 or more, for an advantage is within a group")
        _ = self.params  # which checks the temperature

    @property
    def params(self) -> SamplingParams:
        """Parameters of the rollouts; log-probabilities are of the distribution that training computes them of."""
        return replace(self.sampling, logprobs_mode=self.replay.logprobs_mode)


class GRPORun(PolicyRun):
    """Trains a policy by GRPO. `reference`: a frozen policy that the KL is to; needed unless its weight is 0.

    `rubric_judge`: judges rubric questions; it follows the policy, a step behind. `service`: samples, in place of an
    engine of this process; with a `max_staleness` above 0 while the policy trains. StateError where weights of an
    earlier policy, which the saved state goes with, are missing.
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
        service: RolloutService | None = None,
    ) -> None:
        if settings.learner.objective.kl and reference is None:
            raise ValueError(f"kl is {settings.learner.objective.kl}, but there is no reference policy; allowed: 0")
        super().__init__(policy, optimizer, problems, loop, run_dir, console, quiet, service)
        self.settings, self.rubric_judge = settings, rubric_judge
        self.reference: ReferencePolicy | None = None
        if reference is not None:
            self.reference = ReferencePolicy(reference, policy, settings.reference_every, run_dir, self.position.step)
        self._ahead: Lookahead[Asked] | None = None
        self._files: TrajectoryFiles | None = None
        (policy if service is None else service).set_options(**settings.replay.engine_options)
        if rubric_judge is not None and self.position.step:
            rubric_judge.weights.load(self._judge_path())

    @contextmanager
    def _working(self) -> Iterator[None]:
        """As in PolicyRun; where staleness is allowed, problems of later steps are asked meanwhile."""
        with super()._working():
            if self.service is not None and (ahead := self.service.settings.max_staleness):
                self._ahead = Lookahead(self.position.problems, (ahead + 1) * self.loop.prompts)
            try:
                yield
            finally:
                if self._ahead is not None:
                    self._ahead.close()

    def save(self) -> None:
        """Write the state; first the weights of judge and reference, of whose files only the last state's stay."""
        judge = self._judge_path()
        if self.rubric_judge is not None:
            self.rubric_judge.weights.save(judge)
        if self.reference is not None:
            self.reference.save()
        super().save()
        for path in self.run_dir.glob("judge-*.safetensors"):
            if path != judge:
                path.unlink()
        if self.reference is not None:
            self.reference.clear()

    def _judge_path(self) -> Path:
        return self.run_dir / f"judge-{self.position.step}.safetensors"

    def step(self, rate: float) -> StepFigures:
        started = time.perf_counter()
        if self.reference is not None:
            self.reference.begin(self.position.step)
        if self._files is None or self._ahead is None:
            self._files = TrajectoryFiles(self.run_dir / "episodes")
        with self._sampling() as sampler:
            asked = list(self._groups(sampler))
        if self.rubric_judge is not None:
            self.rubric_judge.weights.follow(self.policy.model)
        sampling = time.perf_counter() - started
        for group in asked:
            if not group.informative:
                for rollout in group.rollouts:
                    rollout.release()
        learned = [group for group in asked if group.informative]
        updates = list(self._update(learned, rate))
        trained = sum(rollout.num_document for group in learned for rollout in group.rollouts)
        tokens = sum(rollout.num_tokens for group in asked for rollout in group.rollouts)
        figures = {"sampling_seconds": round(sampling, 3)} | sampling_figures(asked) | update_figures(updates)
        if updates:
            figures |= self._replay_figures(updates[0])
        if self.service is not None:
            figures |= self._service_figures(self.service, asked)
        if figures.get("staleness_max") and updates:  # then it is not the difference of two computations
            figures["log_ratio_max"] = figures.pop("train_serve_difference")
        return StepFigures(figures, tokens, trained)

    def _service_figures(self, service: RolloutService, asked: Sequence[Group]) -> dict[str, Any]:
        found = staleness((rollout for group in asked for rollout in group.rollouts), self.position.step)
        count = max(1, sum(len(group.rollouts) for group in asked))
        return {
            "staleness": found.mean,
            "staleness_max": found.largest,
            "stale_share": sum(len(group.rollouts) for group in asked if group.stale) / count,
            "worker_deaths": service.num_deaths,
        }

    def _replay_figures(self, first: Update) -> dict[str, int]:
        """Recorded choices that the first update's weights would not have made."""
        replay, figures = self.settings.replay, dict[str, int]()
        if replay.routing:
            figures["routing_differences"] = first.routing_differences
        if replay.indexer:
            figures["indexer_differences"] = first.indexer_differences
        return figures

    def _groups(self, sampler: Callable[[int], Sampler]) -> Iterator[Group]:
        """Groups of this step: until `prompts` of them are informative, or the rounds are used up.

        UpdateError if none of their rollouts could be sampled.
        """
        wanted, sampled, errors = self.loop.prompts, 0, list[str]()
        for _ in range(self.settings.resample):
            asked = self._next(sampler, wanted)
            sampled += len(asked.rollouts)
            errors += [rollout.error for rollout in asked.rollouts if rollout.error is not None]
            groups = self._judged(asked)
            yield from groups
            wanted -= sum(group.informative for group in groups)
            if wanted <= 0:
                return
        if len(errors) == sampled:
            raise UpdateError(f"all {sampled} rollouts of a step failed, the last with: {errors[-1]}")

    def _next(self, sampler: Callable[[int], Sampler], count: int) -> Asked:
        """The next `count` problems, each asked `group_size` times; asked earlier, if a service samples ahead.

        At most as many are asked ahead as the steps up to the bound on staleness use: each of these steps, as far as
        the run has them, takes `prompts` or more, and this one at least `count` more.
        """
        first = self.position.problems
        self.position.problems += count
        if self._ahead is None:
            return self._ask(sampler(first), first, count)
        assert self.service is not None

        def prepare(number: int) -> Callable[[], Asked]:
            chosen = sampler(number)  # with the weights of now
            return lambda: self._ask(chosen, number, 1)

        steps = min(self.service.settings.max_staleness, self._total - self.position.step - 1)
        self._ahead.fill(steps * self.loop.prompts + count, prepare)
        asked = self._ahead.take(count)
        rollouts = [
            replace(cast(Any, rollout), prompt=place) for place, one in enumerate(asked) for rollout in one.rollouts
        ]
        return Asked([problem for one in asked for problem in one.problems], rollouts)

    def _ask(self, sampler: Sampler, first: int, count: int) -> Asked:
        """Ask `count` problems from number `first` on, each `group_size` times."""
        problems, prompts = self.problems_from(sampler, first, count)
        params = replace(self.settings.params, max_tokens=self.loop.max_tokens)
        seed = stable_hash("rollouts", self.loop.seed, first) >> 2
        return Asked(problems, self._sample(sampler, problems, prompts, params, seed, self.sessions.of(first)))

    def _judged(self, asked: Asked) -> list[Group]:
        """Groups of rollouts with rewards."""
        rewards = judge(asked.rollouts, asked.problems, self.settings.rewards, self.rubric_judge)
        errors = sorted({reward.error for reward in rewards if reward.error is not None})
        for error in errors[:SHOWN_ERRORS]:
            self.console.print(f"{error}; its rollouts are left out", highlight=False)
        if len(errors) > SHOWN_ERRORS:
            self.console.print(f"{len(errors) - SHOWN_ERRORS} other errors, whose rollouts are left out")
        pairs = [list[tuple[Sampled, Reward]]() for _ in asked.problems]
        for rollout, reward in zip(asked.rollouts, rewards, strict=True):
            if reward.error is None:
                pairs[rollout.prompt].append((rollout, reward))
            else:
                rollout.release()
        bound = None if self.service is None else self.service.settings.max_staleness
        groups: list[Group] = []
        for problem, judged in zip(asked.problems, pairs, strict=True):
            rollouts, left_out = [rollout for rollout, _ in judged], self.settings.group_size - len(judged)
            stale = bound is not None and staleness(rollouts, self.position.step).largest > bound
            groups.append(Group(problem, rollouts, [reward for _, reward in judged], stale, left_out))
        return groups

    def _sample(
        self,
        llm: Sampler,
        problems: Sequence[Problem],
        prompts: Sequence[list[int]],
        params: SamplingParams,
        seed: int,
        logs: Path,
    ) -> list[Sampled]:
        """Answers to each problem; whole episodes of those with an environment, which log to a folder."""
        settings = self.settings
        assert self._files is not None, "made by each step, or by the first"
        episodes = Episodes(settings.episodes, self._files, logs)
        return ask(llm, problems, prompts, settings.group_size, params, seed, episodes)

    def _update(self, groups: Sequence[Group], rate: float) -> Iterator[Update]:
        """Update in mini-batches of shuffled rollouts."""
        settings = self.settings
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        owners = [place for place, group in enumerate(groups) for _ in group.rollouts]
        values = [reward.value for group in groups for reward in group.rewards]
        gains = advantages(values, owners, settings.learner.objective.advantage_scale)
        references: Sequence[tuple[float, ...] | None] = [None] * len(rollouts)
        if self.reference is not None and rollouts:
            references = with_reference(self.reference.model, rollouts, settings.learner.micro_tokens)
        batch = [Judged(*one) for one in zip(rollouts, gains, references, strict=True)]
        Random(stable_hash("mini-batches", self.loop.seed, self.position.step)).shuffle(batch)
        for mini_batch in even_parts(batch, settings.mini_batches):
            yield update(self.policy.model, self.optimizer, mini_batch, rate, settings.learner)
            for judged in mini_batch:
                judged.rollout.release()


def even_parts(items: Sequence[T], count: int) -> list[Sequence[T]]:
    """The items in `count` parts, in their order, whose lengths differ by 1 at most; of fewer items, one each."""
    count = min(count, len(items))
    bounds = [place * len(items) // count for place in range(count + 1)] if count else []
    return [items[first:last] for first, last in pairwise(bounds)]
