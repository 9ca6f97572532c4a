"""Parts of the corpus in the student's fine-tuning and distillation: without them it forgets what it has read."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from dsv4.checkpoint.atomic import new_file
from dsv4.data.nano.build import NanoData
from dsv4.post_training.v4_recipe import V4Recipe

MADE = "texts.json"  # in the data's folder: the parts whose shards stand


class StudentTexts:
    """Shards of `student_sft.texts` in `folder`, which the base's own run fills too."""

    def __init__(self, recipe: V4Recipe, folder: Path) -> None:
        """ValueError for shares that are none."""
        self.shares = recipe.student_sft.shares()
        self.made = folder / MADE
        self._folder, self._given = folder, recipe.nano.data

    @cached_property
    def data(self) -> NanoData:
        """The corpus's parts. ValueError for a corpus that is none, or without one of the parts."""
        data = NanoData(Path(self._given.corpus), self._folder, self._given.seed, self._given.scale)
        for part in self.shares:
            if part not in (parts := data.parts()):
                raise ValueError(f"student_sft.texts has {part}; allowed: {', '.join(parts)}")
        return data

    def make(self, say: Callable[[str], object]) -> None:
        """Make the shards; the data's tokenizer has to be that of the model."""
        self.data.make(say, self.shares)
        with new_file(self.made) as temporary:
            temporary.write_text(json.dumps(sorted(self.shares)) + "\n", encoding="utf-8")

    def folders(self) -> dict[Path, float]:
        """Shards of each part, and its share."""
        return {self.data.shards(part): share for part, share in self.shares.items()}


def texts_of(recipe: V4Recipe, folder: Path) -> StudentTexts | None:
    """The student's texts; None without a corpus or without parts."""
    return StudentTexts(recipe, folder) if recipe.nano.data.corpus and recipe.student_sft.texts else None
