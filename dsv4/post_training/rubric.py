"""Generative reward model: the policy judges answers by a rubric, and is trained to judge where labels are known.

A judge prompt shows the question, the answer between marks and the rubric, and asks for a whole score from 0 to
`MAX_SCORE` as the last line. The report gives neither format nor scale; a number on a line of its own is what a small
model can learn to write and a parser reads without doubt.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from deepseek_recipe import Conversation, UserMessage

from dsv4.post_training.problems import answer_of

MAX_SCORE = 10
_SCORE = re.compile(r"\s*score\s*:\s*(-?\d{1,9})\s*", re.IGNORECASE)  # thousands of digits are no int of Python
_MARK = "====="


@dataclass(frozen=True)
class RubricQuestion:
    """A question whose answers are judged by the rubric. `asked`: the prompt; None: the question alone.

    `known`: the true reward of an answer, where one is known. It is logged beside the judge's, never learned from.
    """

    key: str
    question: str
    rubric: str
    domain: str = "rubric"
    thinking: bool = True
    asked: Conversation | None = field(default=None, compare=False)
    known: Callable[[str], float] | None = field(default=None, compare=False)

    def prompt(self) -> Conversation:
        return self.asked or Conversation([UserMessage(self.question)], thinking_mode=self.thinking)

    def reward(self, answer: str) -> float:
        """Never called: `RubricJudge.scores` gives the rewards of a whole step at once."""
        raise TypeError(f"{self.key}: a rubric question is judged by the model, in GRPORun(rubric_judge=...)")


@dataclass(frozen=True)
class JudgeQuestion:
    """A judgement with a known label, to train judging: its reward is agreement with `label`, 0 to MAX_SCORE."""

    key: str
    question: str
    answer: str
    rubric: str
    label: int
    domain: str = "judge"
    thinking: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.label <= MAX_SCORE:
            raise ValueError(f"{self.key}: label is {self.label}; allowed: 0 to {MAX_SCORE}")

    def prompt(self) -> Conversation:
        return judge_prompt(self.question, self.answer, self.rubric, self.thinking)

    def reward(self, answer: str) -> float:
        """1 for the label itself, less in proportion to the difference, 0 for what is no score."""
        score = read_score(answer)
        return 0.0 if score is None else 1.0 - abs(score - self.label) / MAX_SCORE


def judge_prompt(question: str, answer: str, rubric: str, thinking: bool = True) -> Conversation:
    """The conversation that asks for a score.

    Lines of the answer that look like the marks around it are indented, so that an answer cannot end its own quotation
    and speak as the judge's user.
    """
    quoted = "\n".join(f" {line}" if line.strip().startswith(_MARK) else line for line in answer.splitlines())
    text = (
        f"Judge an answer by a rubric.\n\nQuestion:\n{question}\n\nAnswer, between the marks:\n{_MARK}\n{quoted}\n"
        f"{_MARK}\n\nRubric:\n{rubric}\n\nThe last line must be: Score: N, with N from 0 (worst) to {MAX_SCORE} (best)."
    )
    return Conversation([UserMessage(text)], thinking_mode=thinking)


def read_score(text: str) -> int | None:
    """Score on the last line that is not empty; None if that line is no score from 0 to MAX_SCORE."""
    lines = [line for line in text.splitlines() if line.strip()]
    found = _SCORE.fullmatch(lines[-1]) if lines else None
    if found is None or not 0 <= int(found[1]) <= MAX_SCORE:
        return None
    return int(found[1])


@dataclass(frozen=True)
class Verdict:
    """Score of an answer from 0 to 1, or in words why there is none."""

    value: float | None
    error: str | None = None
    reason: str = ""  # of the value, where there is one


def verdict(key: str, thinking: bool, text: str, finished: bool) -> Verdict:
    """Verdict on an answer to `key`, in the text of a judge; nonsense is an error and no score.

    `thinking`: the text begins with the judge's.
    """
    answer = answer_of(text, thinking) if finished else None
    score = None if answer is None else read_score(answer)
    if score is None:
        shown = text.strip()[-60:]
        return Verdict(None, f"the judge of {key} gave no score from 0 to {MAX_SCORE}: ...{shown!r}")
    return Verdict(score / MAX_SCORE)
