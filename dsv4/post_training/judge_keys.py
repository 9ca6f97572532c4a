"""Keys of the generative reward model in recipes, with their defaults (reasons: docs/post-training.md)."""

from __future__ import annotations

from typing import Self

from dsv4.post_training.data_problems import Files, absolute, read_judgements
from dsv4.post_training.key_types import Count, Positive
from dsv4.post_training.rubric import JudgeQuestion
from dsv4.training.recipe import Section


class JudgeSection(Section):
    """Judging of rubric questions by the policy itself; `data`: labelled judgements that it learns to judge from."""

    data: Files = ()
    weight: Positive = 1.0  # of the judgements, beside those of problems
    thinking: bool = True  # before a score
    max_tokens: Count = 256  # of a judgement of the judge

    def judgements(self) -> tuple[JudgeQuestion, ...]:
        """The labelled judgements of the files."""
        return read_judgements(self.data, self.thinking)

    def placed(self) -> Self:
        """The section with files that mean the same in any folder."""
        return self.model_copy(update={"data": absolute(self.data)})
