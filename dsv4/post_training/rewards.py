"""Rewards of rollouts: the problem's, format and length; an error of a reward is reported and costs its rollout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsv4.post_training.efforts import penalty_of
from dsv4.post_training.episodes.trajectory import Trajectory
from dsv4.post_training.problems import ExplainedProblem, Problem, answer_of
from dsv4.post_training.rollouts import Sampled
from dsv4.post_training.rubric import RubricQuestion, Verdict

if TYPE_CHECKING:
    from dsv4.post_training.rubric_judge import RubricJudge

LengthReward = Callable[[int], float]  # tokens of the answer, thinking included -> reward, 0 or less


@dataclass(frozen=True)
class RewardSettings:
    """Terms of a reward besides the problem's own and that of its effort."""

    unfinished: float = 0.0  # of an answer that is cut off, or whose thinking never ends; in place of the problem's
    judge_cut_off: bool = False  # an answer that is cut off is judged as it stands
    length: LengthReward | None = None


@dataclass(frozen=True)
class Reward:
    """Reward of one rollout; `error` in words if its problem could not judge it: then it is in no group."""

    value: float
    correct: bool
    error: str | None = None
    reason: str = ""  # of the value, where the problem says one


def judge(
    rollouts: Sequence[Sampled],
    problems: Sequence[Problem],
    settings: RewardSettings | None = None,
    rubric_judge: RubricJudge | None = None,
) -> list[Reward]:
    """Reward of each rollout by the problem of its prompt; of rubric questions by the judge, all at once."""
    settings = settings or RewardSettings()
    answers = [_answer(rollout, problems[rollout.prompt], settings) for rollout in rollouts]
    asked = [(place, problems[rollout.prompt]) for place, rollout in enumerate(rollouts) if answers[place] is not None]
    by_rubric = [(place, problem) for place, problem in asked if isinstance(problem, RubricQuestion)]
    verdicts: dict[int, Verdict] = {}
    if by_rubric:
        if rubric_judge is None:
            raise ValueError(f"{by_rubric[0][1].key} is judged by a rubric, but there is no judge; give one")
        texts = [answers[place] or "" for place, _ in by_rubric]
        scores = rubric_judge.scores([problem for _, problem in by_rubric], texts)
        verdicts = {place: score for (place, _), score in zip(by_rubric, scores, strict=True)}
    rewards: list[Reward] = []
    for place, rollout in enumerate(rollouts):
        extra = settings.length(rollout.num_tokens) if settings.length is not None else 0.0
        extra += penalty_of(problems[rollout.prompt], rollout.num_tokens)
        answer = answers[place]
        if rollout.error is not None:
            rewards.append(Reward(0.0, False, rollout.error))
            continue
        if answer is None:
            rewards.append(Reward(settings.unfinished + extra, correct=False))
            continue
        found = verdicts[place] if place in verdicts else _verdict(problems[rollout.prompt], answer, rollout)
        if found.value is None:
            rewards.append(Reward(0.0, False, found.error))
        else:
            rewards.append(Reward(found.value + extra, found.value >= 1.0, reason=found.reason))
    return rewards


def _answer(rollout: Sampled, problem: Problem, settings: RewardSettings) -> str | None:
    """The answer to judge; None if there is none."""
    judged = rollout.finished or (settings.judge_cut_off and not isinstance(rollout, Trajectory))
    return answer_of(rollout.text, problem.thinking) if judged else None


def _verdict(problem: Problem, answer: str, rollout: Sampled) -> Verdict:
    try:
        if isinstance(rollout, Trajectory):
            explained = rollout.outcome  # of its environment, at its end
        else:
            explained = problem.explain(answer) if isinstance(problem, ExplainedProblem) else None
        value = problem.reward(answer) if explained is None else explained.value
    except Exception as error:  # a reward is the user's code: the run goes on without this rollout
        return Verdict(None, f"the reward of {problem.domain} raised {type(error).__name__}: {error}")
    if value - value != 0.0:  # infinite, or no number
        return Verdict(None, f"the reward of {problem.domain} is {value}; allowed: a finite number")
    return Verdict(value, reason="" if explained is None else explained.reason)
