"""Scores of a model in the domains: greedy answers, or whole episodes with tools, on the held-out split."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory

from dsv4.engine import LLM, SamplingParams
from dsv4.evals.intervals import wilson
from dsv4.notices import warn_once
from dsv4.post_training.asking import Episodes, ask
from dsv4.post_training.domains.domain import Level
from dsv4.post_training.domains.registry import open_domain
from dsv4.post_training.effort_names import Mode, asked_efforts
from dsv4.post_training.efforts import EffortMode, with_effort
from dsv4.post_training.episodes.environment import EpisodeLimits
from dsv4.post_training.episodes.trajectory import TrajectoryFiles
from dsv4.post_training.problems import Problem
from dsv4.post_training.rewards import judge
from dsv4.post_training.rollouts import Sampled

COUNT, MAX_TOKENS = 100, 512
BATCH = 64  # problems per call of the engine
REPEATS = 50  # draws per wanted problem, at most, until all are distinct


@dataclass(frozen=True)
class DomainScore:
    """Counts of one domain: right answers, problems, sampled tokens."""

    correct: int
    asked: int
    tokens: int

    @property
    def rate(self) -> float:
        return self.correct / self.asked if self.asked else 0.0

    @property
    def mean_tokens(self) -> float:
        return self.tokens / self.asked if self.asked else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson 95 % interval of the rate."""
        return wilson(self.correct, self.asked)


def evaluate_domain(
    model: str | Path | LLM,
    domain: str,
    count: int = COUNT,
    seed: int = 1,
    thinking: bool | None = None,
    efforts: Sequence[str | int] = (),
    max_tokens: int = MAX_TOKENS,
    level: Level = "standard",
    windows: Mapping[Mode, int | None] | None = None,
) -> DomainScore:
    """Score of a model on `count` problems of a domain's held-out split, none twice; fewer if the domain has fewer.

    `thinking` None leaves the mode to the problems. `efforts`: in turns; none: as the problems have it. `max_tokens`:
    of an answer, or of one turn of an episode. `windows`: most tokens under an effort, of a whole episode. An answer
    that cannot be judged counts as wrong, with a warning.
    ValueError for an unknown domain, or one that lacks what it needs.
    """
    llm = model if isinstance(model, LLM) else LLM(model, max_num_seqs=32)
    problems = held_out_problems(domain, count, seed, thinking, level)
    if efforts:
        modes = cycle([EffortMode(effort, (windows or {}).get(effort)) for effort in asked_efforts(efforts)])
        problems = [with_effort(problem, next(modes)) for problem in problems]
    correct = tokens = 0
    for rollouts, asked in _answers(llm, problems, max_tokens):
        rewards = judge(rollouts, asked)
        correct += sum(reward.correct for reward in rewards)
        for reward in rewards:
            if reward.error is not None:
                warn_once(f"{reward.error}; such answers of {domain} count as wrong")
        tokens += sum(rollout.num_tokens for rollout in rollouts)
        for rollout in rollouts:
            rollout.release()
    return DomainScore(correct, len(problems), tokens)


def held_out_problems(
    domain: str, count: int, seed: int = 1, thinking: bool | None = None, level: Level = "standard"
) -> list[Problem]:
    """The first `count` distinct problems of a domain's held-out split, in REPEATS draws each at most."""
    opened = open_domain(domain, thinking, level)
    opened.prepare()
    found: dict[str, Problem] = {}
    for number in range(count * REPEATS):
        if len(found) == count:
            break
        problem = opened.problem(seed, number, "eval")
        found.setdefault(problem.key, problem)
    return list(found.values())


def _answers(
    llm: LLM, problems: Sequence[Problem], max_tokens: int
) -> Iterator[tuple[list[Sampled], Sequence[Problem]]]:
    """Greedy answers, or episodes, of BATCH problems at a time, with the problems."""
    if llm.prompts is None:
        raise ValueError("the model has no tokenizer; problems are asked in text")
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    with TemporaryDirectory() as folder:
        files = TrajectoryFiles(Path(folder) / "episodes")
        for start in range(0, len(problems), BATCH):
            asked = problems[start : start + BATCH]
            prompts = [llm.prompts.encode(problem.prompt()) for problem in asked]
            yield ask(llm, asked, prompts, 1, params, 0, Episodes(EpisodeLimits(), files)), asked
