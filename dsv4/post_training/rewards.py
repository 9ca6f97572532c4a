"""Rewards of rollouts: the problem's, format and length; an error of a reward is reported and costs its rollout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dsv4.post_training.problems import Problem, answer_of
from dsv4.post_training.rollouts import Rollout

LengthReward = Callable[[int], float]  # tokens of the answer, thinking included -> reward, 0 or less


@dataclass(frozen=True)
class RewardSettings:
    """What a reward adds up from, besides the problem's own."""

    unfinished: float = 0.0  # of an answer that is cut off, or whose thinking never ends; in place of the problem's
    judge_cut_off: bool = False  # an answer that is cut off is judged as it stands
    length: LengthReward | None = None


@dataclass(frozen=True)
class Reward:
    """Reward of one rollout; `error` in words if its problem could not judge it: then it is in no group."""

    value: float
    correct: bool
    error: str | None = None


def judge(
    rollouts: Sequence[Rollout], problems: Sequence[Problem], settings: RewardSettings | None = None
) -> list[Reward]:
    """Reward of each rollout by the problem of its prompt."""
    settings = settings or RewardSettings()
    return [_judge(rollout, problems[rollout.prompt], settings) for rollout in rollouts]


def _judge(rollout: Rollout, problem: Problem, settings: RewardSettings) -> Reward:
    answer = answer_of(rollout.text, problem.thinking) if rollout.finished or settings.judge_cut_off else None
    extra = settings.length(len(rollout.token_ids)) if settings.length is not None else 0.0
    if answer is None:
        return Reward(settings.unfinished + extra, correct=False)
    try:
        value = problem.reward(answer)
    except Exception as error:  # a reward is the user's code, or a judge: the run goes on without this rollout
        return Reward(0.0, False, f"the reward of {problem.domain} raised {type(error).__name__}: {error}")
    if value - value != 0.0:  # infinite, or no number
        return Reward(0.0, False, f"the reward of {problem.domain} is {value}; allowed: a finite number")
    return Reward(value + extra, correct=value >= 1.0)
