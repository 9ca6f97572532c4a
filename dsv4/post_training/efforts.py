"""Problems asked in a mode: without thinking, or with an effort, a level or a scalar budget.

Each mode may have a window and a length penalty of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from deepseek_recipe import Conversation

from dsv4.data.stable_hash import stable_hash
from dsv4.post_training.effort_names import EFFORTS, NON_THINK, Mode
from dsv4.post_training.episodes.environment import Environment, EpisodeProblem
from dsv4.post_training.problems import Explained, ExplainedProblem, ParallelProblem, Problem, ProblemSource
from dsv4.tokenizer.effort_number import MAX_BUDGET, NUMBERS
from dsv4.tokenizer.prompts import LADDER_KEY, LADDERS, effort_ladder, with_budget, with_messages

BAND = 25  # budgets that a log sums up
BANDS = (NON_THINK, *EFFORTS, *(f"{first}-{first + BAND - 1}" for first in range(1, MAX_BUDGET, BAND)))
Penalty = Callable[[int], float]  # sampled tokens, thinking included -> reward, 0 or less


@dataclass(frozen=True)
class EffortMode:
    """`none`, a level or a budget, the most tokens of its answers (of a whole episode), its length penalty; None:
    without."""

    effort: Mode
    window: int | None = None
    penalty: Penalty | None = None

    @property
    def band(self) -> str:
        """The name, or the range of budgets, under which logs have it: one of BANDS."""
        if not isinstance(self.effort, int):
            return self.effort
        first = (self.effort - 1) // BAND * BAND + 1
        return f"{first}-{first + BAND - 1}"


@dataclass(frozen=True)
class EffortProblem:
    """A problem that is asked in a mode; its rewards are the problem's, before the mode's penalty."""

    inner: Problem
    mode: EffortMode

    @property
    def domain(self) -> str:
        return self.inner.domain

    @property
    def key(self) -> str:
        return self.inner.key

    @property
    def thinking(self) -> bool:
        return self.mode.effort != NON_THINK and self.inner.thinking

    @property
    def parallel(self) -> bool:
        return isinstance(self.inner, ParallelProblem) and self.inner.parallel

    def prompt(self) -> Conversation:
        asked = self.inner.prompt()
        if self.mode.effort == NON_THINK:
            return with_messages(asked, asked.messages, thinking_mode=False)
        if isinstance(self.mode.effort, int):
            return with_budget(asked, self.mode.effort)
        return with_messages(asked, asked.messages, reasoning_effort=self.mode.effort)

    def reward(self, answer: str) -> float:
        return self.inner.reward(answer)

    def explain(self, answer: str) -> Explained:
        if isinstance(self.inner, ExplainedProblem):
            return self.inner.explain(answer)
        return Explained(self.inner.reward(answer), "")


@dataclass(frozen=True)
class EffortGoal(EffortProblem):
    """A goal of episodes that is asked in a mode."""

    def environment(self) -> Environment:
        assert isinstance(self.inner, EpisodeProblem)
        return self.inner.environment()


@dataclass(frozen=True)
class EffortProblems:
    """The problems of a source, each asked with one of the modes, drawn by its number."""

    source: ProblemSource
    modes: tuple[EffortMode, ...]
    seed: int = 1

    def problem(self, number: int, /) -> EffortProblem:
        mode = Random(stable_hash("effort", self.seed, number)).choice(self.modes)
        return with_effort(self.source.problem(number), mode)


@dataclass(frozen=True)
class SomeEfforts:
    """The problems of `plain`; of `domains`, those that `efforts` has under the same numbers."""

    plain: ProblemSource
    efforts: EffortProblems
    domains: tuple[str, ...]

    def problem(self, number: int, /) -> Problem:
        problem = self.plain.problem(number)
        return self.efforts.problem(number) if problem.domain in self.domains else problem


def with_effort(problem: Problem, mode: EffortMode) -> EffortProblem:
    """The problem, which thinks, asked in a mode."""
    return EffortGoal(problem, mode) if isinstance(problem, EpisodeProblem) else EffortProblem(problem, mode)


def unwrapped(problem: Problem) -> Problem:
    """The problem itself, without its effort."""
    return problem.inner if isinstance(problem, EffortProblem) else problem


def effort_of(problem: Problem) -> Mode | None:
    """The effort that a problem is asked with, or `none`; None: in no mode."""
    return problem.mode.effort if isinstance(problem, EffortProblem) else None


def window_of(problem: Problem, most: int) -> int:
    """Most tokens of an answer: `most`, or fewer by the problem's effort."""
    window = problem.mode.window if isinstance(problem, EffortProblem) else None
    return most if window is None else min(most, window)


def penalty_of(problem: Problem, tokens: int) -> float:
    """Reward, 0 or less, of an answer of `tokens` tokens by the problem's effort."""
    penalty = problem.mode.penalty if isinstance(problem, EffortProblem) else None
    return 0.0 if penalty is None else penalty(tokens)


def check_ladder(folder: Path, modes: Sequence[Mode]) -> None:
    """ValueError if efforts have the same prompt under a model folder's ladder, or budgets have none there."""
    ladder = effort_ladder(folder)
    efforts = [mode for mode in modes if mode != NON_THINK]
    scalar = f'"{LADDER_KEY}": "scalar" in its generation_config.json'
    if ladder != "scalar" and any(isinstance(effort, int) for effort in efforts):
        raise ValueError(f"efforts are budgets, and the ladder of {folder} is {ladder}; allowed: {scalar}")
    levels = NUMBERS if ladder == "scalar" else LADDERS[ladder]
    rendered = {effort: effort if isinstance(effort, int) else levels[effort] for effort in efforts}
    alike = [effort for effort in efforts if list(rendered.values()).count(rendered[effort]) > 1]
    if alike:
        raise ValueError(
            f"efforts {' and '.join(map(str, alike))} have the same prompt under the ladder {ladder} of {folder}; "
            f'"{LADDER_KEY}": "0731" in its generation_config.json tells them apart'
        )
