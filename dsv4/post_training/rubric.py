"""Generative reward model: the policy judges answers by a rubric, and is trained to judge where labels are known.

A judge prompt shows the question, the answer between marks and the rubric, and asks for a whole score from 0 to
`JudgeForm.max_score` as the last line. The report gives neither format nor scale; a number on a line of its own is what
a small model can learn to write and a parser reads without doubt.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from deepseek_recipe import Conversation, UserMessage

from dsv4.post_training.problems import answer_of

Agreement = Literal["linear", "exact", "side"]
JUDGE_PROMPT = """\
Judge an answer by a rubric.

Question:
{question}

Answer, between the marks:
{answer}

Rubric:
{rubric}

The last line must be: Score: N, with N from 0 (worst) to {max_score} (best)."""
_FIELD = re.compile(r"\{(question|answer|rubric|max_score)\}")
_SCORE = re.compile(r"\s*score\s*:\s*(-?\d{1,9})\s*", re.IGNORECASE)  # thousands of digits are no int of Python
_MARK = "====="


@dataclass(frozen=True)
class JudgeForm:
    """How a judge is asked for a score, and how a judgement is rewarded where the right score is known.

    `prompt` names `{question}`, `{answer}` and `{rubric}`, and `{max_score}` if it likes; other braces are text.
    `agreement`: linear, 1 for the right score and less in proportion to the difference; exact, 1 for it alone; side, 1
    on its side of half of `max_score`. ValueError for a prompt that leaves something out, or a scale below 1.
    """

    max_score: int = 10
    prompt: str = JUDGE_PROMPT
    agreement: Agreement = "linear"

    def __post_init__(self) -> None:
        if self.max_score < 1:
            raise ValueError(f"max_score is {self.max_score}; allowed: 1 or more")
        found = set(_FIELD.findall(self.prompt))
        if missing := [name for name in ("question", "answer", "rubric") if name not in found]:
            names = " and ".join(f"{{{name}}}" for name in missing)
            raise ValueError(f"the judge's prompt {self.prompt[:60]!r} has no {names}; allowed: one with each of them")

    def ask(self, question: str, answer: str, rubric: str, thinking: bool = True) -> Conversation:
        """The conversation that asks for a score.

        The answer stands between marks. Its lines that look like them are indented, so that it cannot end its own
        quotation and speak as the judge's user.
        """
        lines = [f" {line}" if line.strip().startswith(_MARK) else line for line in answer.splitlines()]
        texts = {
            "question": question,
            "answer": "\n".join([_MARK, *lines, _MARK]),
            "rubric": rubric,
            "max_score": str(self.max_score),
        }
        text = _FIELD.sub(lambda match: texts[match[1]], self.prompt)
        return Conversation([UserMessage(text)], thinking_mode=thinking)

    def score(self, text: str) -> int | None:
        """Score on the last line that is not empty; None if that line is no score from 0 to `max_score`."""
        lines = [line for line in text.splitlines() if line.strip()]
        found = _SCORE.fullmatch(lines[-1]) if lines else None
        if found is None or not 0 <= int(found[1]) <= self.max_score:
            return None
        return int(found[1])

    def agrees(self, score: int, label: int) -> float:
        """Reward, 0 to 1, of a score where `label` is right."""
        if self.agreement == "exact":
            return float(score == label)
        if self.agreement == "side":
            return float(self.is_good(score) == self.is_good(label))
        return 1.0 - abs(score - label) / self.max_score

    def is_good(self, score: int) -> bool:
        """True for a score above half of the highest."""
        return 2 * score > self.max_score


DEFAULT_FORM = JudgeForm()


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
    """A judgement with a known label, to train judging: its reward is agreement with `label`, a score of `form`."""

    key: str
    question: str
    answer: str
    rubric: str
    label: int
    domain: str = "judge"
    thinking: bool = True
    form: JudgeForm = DEFAULT_FORM

    def __post_init__(self) -> None:
        if not 0 <= self.label <= self.form.max_score:
            raise ValueError(f"{self.key}: label is {self.label}; allowed: 0 to {self.form.max_score}")

    def prompt(self) -> Conversation:
        return self.form.ask(self.question, self.answer, self.rubric, self.thinking)

    def reward(self, answer: str) -> float:
        """Agreement with the label, 0 to 1; 0 for what is no score."""
        score = self.form.score(answer)
        return 0.0 if score is None else self.form.agrees(score, self.label)


@dataclass(frozen=True)
class Verdict:
    """Score of an answer from 0 to 1, or in words why there is none."""

    value: float | None
    error: str | None = None
    reason: str = ""  # of the value, where there is one


def verdict(key: str, thinking: bool, text: str, finished: bool, form: JudgeForm = DEFAULT_FORM) -> Verdict:
    """Verdict on an answer to `key`, in the text of a judge; nonsense is an error and no score.

    `thinking`: the text begins with the judge's.
    """
    answer = answer_of(text, thinking) if finished else None
    score = None if answer is None else form.score(answer)
    if score is None:
        shown = text.strip()[-60:]
        return Verdict(None, f"the judge of {key} gave no score from 0 to {form.max_score}: ...{shown!r}")
    return Verdict(score / form.max_score)
