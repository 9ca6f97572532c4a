"""Rewards of rollouts: the problem's, format and length; an error of a reward is reported and costs its rollout."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsv4.post_training.efforts import penalty_of, unwrapped
from dsv4.post_training.episodes.trajectory import Trajectory
from dsv4.post_training.language import consistency, question_of
from dsv4.post_training.problems import ExplainedProblem, ParallelProblem, Problem, answer_of
from dsv4.post_training.rollouts import Sampled
from dsv4.post_training.rubric import RubricQuestion, Verdict

if TYPE_CHECKING:
    from dsv4.post_training.rubric_judge import RubricJudge

LengthReward = Callable[[int], float]  # tokens of the answer, thinking included -> reward, 0 or less


@dataclass(frozen=True, kw_only=True)
class RewardSettings:
    """Terms of a reward besides the problem's own and that of its effort."""

    unfinished: float = 0.0  # of an answer that is cut off, or whose thinking never ends; in place of the problem's
    judge_cut_off: bool = False  # an answer that is cut off is judged as it stands
    length: LengthReward | None = None
    language: float = 0.0  # taken from the reward where nothing is in the question's language (language.py)
    threads: int = 0  # that judge answers of problems that run programs; 0: one per processor

    def __post_init__(self) -> None:
        if not math.isfinite(self.unfinished):
            raise ValueError(f"unfinished is {self.unfinished}; allowed: a finite number")
        if not 0.0 <= self.language < math.inf:
            raise ValueError(f"language is {self.language}; allowed: 0 or more, a finite number")
        if self.threads < 0:
            raise ValueError(f"threads is {self.threads}; allowed: 0 (one per processor), or more")


@dataclass(frozen=True)
class Reward:
    """Reward of one rollout; `error` in words if its problem could not judge it: then it is in no group."""

    value: float
    correct: bool
    error: str | None = None
    reason: str = ""  # of the value, where the problem says one
    by_rubric: float | None = None  # the judge's share of the value, of rubric questions
    known: float | None = None  # and the true reward beside it, where one is known
    language: float | None = None  # share of the answer in the question's language, where it counts


def judge(
    rollouts: Sequence[Sampled],
    problems: Sequence[Problem],
    settings: RewardSettings | None = None,
    rubric_judge: RubricJudge | None = None,
) -> list[Reward]:
    """Reward of each rollout by the problem of its prompt; of rubric questions by the judge, all at once."""
    settings = settings or RewardSettings()
    answers = [_answer(rollout, problems[rollout.prompt], settings) for rollout in rollouts]
    verdicts = _by_rubric(rollouts, problems, answers, rubric_judge)
    verdicts |= _verdicts(rollouts, problems, answers, settings.threads)
    return [
        _reward(rollout, problems[rollout.prompt], answers[place], verdicts.get(place), settings)
        for place, rollout in enumerate(rollouts)
    ]


def _reward(
    rollout: Sampled, problem: Problem, answer: str | None, found: Verdict | None, settings: RewardSettings
) -> Reward:
    """Reward of a rollout, of whose answer `found` is the verdict; None: there is no answer."""
    if rollout.error is not None:
        return Reward(0.0, False, rollout.error)
    if found is not None and found.value is None:
        return Reward(0.0, False, found.error)
    given = settings.unfinished if found is None or found.value is None else found.value
    total = _with_penalties(given, problem, rollout.num_tokens, settings)
    if total.value is None:
        return Reward(0.0, False, total.error)
    value, language = total.value, None
    if settings.language:
        language = consistency(question_of(problem.prompt()), rollout.text)
        value -= settings.language * (1.0 - language)
    if answer is None or found is None:
        return Reward(value, correct=False, language=language)
    asked, by_rubric, known = unwrapped(problem), None, None
    if isinstance(asked, RubricQuestion):
        by_rubric, known = given, _known(asked, answer)
    return Reward(value, given >= 1.0, None, found.reason, by_rubric, known, language)


def _with_penalties(given: float, problem: Problem, tokens: int, settings: RewardSettings) -> Verdict:
    """A reward and those of the answer's length, of `tokens` tokens, added up."""
    try:
        extra = penalty_of(problem, tokens) + (0.0 if settings.length is None else settings.length(tokens))
        value = given + extra
        finite = math.isfinite(value)
    except Exception as error:  # a penalty may be the user's code, as a reward is
        return Verdict(None, f"the length penalty of {problem.domain} raised {type(error).__name__}: {error}")
    if not finite:
        words = f"the reward of {problem.domain} with its length penalty is {value}; allowed: a finite number"
        return Verdict(None, words)
    return Verdict(value)


def _known(problem: RubricQuestion, answer: str) -> float | None:
    """The true reward; None where none is known."""
    try:
        return None if problem.known is None else problem.known(answer)
    except Exception:  # a check of the user's answer: it is a figure of the log, not a reward
        return None


def _answer(rollout: Sampled, problem: Problem, settings: RewardSettings) -> str | None:
    """The answer to judge; None if there is none."""
    judged = rollout.finished or (settings.judge_cut_off and not isinstance(rollout, Trajectory))
    return answer_of(rollout.text, problem.thinking) if judged and rollout.error is None else None


def _by_rubric(
    rollouts: Sequence[Sampled],
    problems: Sequence[Problem],
    answers: Sequence[str | None],
    rubric_judge: RubricJudge | None,
) -> dict[int, Verdict]:
    """Verdicts on the answers to rubric questions, by place."""
    asked = [
        (place, problem, answer)
        for place, answer in enumerate(answers)
        if answer is not None and isinstance(problem := unwrapped(problems[rollouts[place].prompt]), RubricQuestion)
    ]
    if not asked:
        return {}
    if rubric_judge is None:
        raise ValueError(
            f"{asked[0][1].key} is judged by a rubric, but there is no judge; give GRPORun(rubric_judge=...)"
        )
    places, questions, texts = zip(*asked, strict=True)
    return dict(zip(places, rubric_judge.scores(questions, texts), strict=True))


def _verdicts(
    rollouts: Sequence[Sampled], problems: Sequence[Problem], answers: Sequence[str | None], threads: int
) -> dict[int, Verdict]:
    """Verdicts of the problems themselves, by place: of those that run programs in threads, of the rest one by one."""
    asked = [
        (place, problems[rollouts[place].prompt], answer, rollouts[place])
        for place, answer in enumerate(answers)
        if answer is not None and not isinstance(unwrapped(problems[rollouts[place].prompt]), RubricQuestion)
    ]
    parallel = [one for one in asked if isinstance(one[1], ParallelProblem) and one[1].parallel]
    found: dict[int, Verdict] = {}
    if parallel:
        with ThreadPoolExecutor(threads or os.cpu_count() or 1, thread_name_prefix="rewards") as pool:
            verdicts = pool.map(lambda one: _verdict(*one[1:]), parallel)
            found = {one[0]: verdict for one, verdict in zip(parallel, verdicts, strict=True)}
    return found | {one[0]: _verdict(*one[1:]) for one in asked if one[0] not in found}


def _verdict(problem: Problem, answer: str, rollout: Sampled) -> Verdict:
    try:
        if isinstance(rollout, Trajectory):
            explained = rollout.outcome  # of its environment, at its end
        else:
            explained = problem.explain(answer) if isinstance(problem, ExplainedProblem) else None
        value = problem.reward(answer) if explained is None else explained.value
        finite = math.isfinite(value)
    except Exception as error:  # a reward is the user's code: the run goes on without this rollout
        return Verdict(None, f"the reward of {problem.domain} raised {type(error).__name__}: {error}")
    if not finite:
        return Verdict(None, f"the reward of {problem.domain} is {value}; allowed: a finite number")
    return Verdict(value, reason="" if explained is None else explained.reason)
