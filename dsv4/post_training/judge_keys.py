"""Keys of the generative reward model in recipes, with their defaults (reasons: docs/post-training.md)."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from dsv4.post_training.data_problems import Files, absolute, read_judgements
from dsv4.post_training.key_types import Count, Positive
from dsv4.post_training.rubric import JUDGE_PROMPT, Agreement, JudgeForm, JudgeQuestion
from dsv4.training.recipe import Section


class JudgeSection(Section):
    """Judging of rubric questions by the policy itself; `data`: labelled judgements that it learns to judge from."""

    data: Files = ()
    weight: Positive = 1.0  # of the judgements, beside those of problems
    thinking: bool = True  # before a score
    max_tokens: Count = 256  # of a judgement of the judge
    max_score: Count = JudgeForm.max_score
    agreement: Agreement = JudgeForm.agreement  # with a label, which is the reward of a judgement
    prompt: str = JUDGE_PROMPT  # with {question}, {answer}, {rubric} and {max_score}

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.form()
        return self

    def form(self) -> JudgeForm:
        """How the judge is asked. ValueError for a prompt that leaves something out."""
        return JudgeForm(self.max_score, self.prompt, self.agreement)

    def judgements(self) -> tuple[JudgeQuestion, ...]:
        """The labelled judgements of the files."""
        return read_judgements(self.data, self.thinking, self.form())

    def placed(self) -> Self:
        """The section with files that mean the same in any folder."""
        return self.model_copy(update={"data": absolute(self.data)})
