"""Every key of the recipes of GRPO and distillation is in their page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dsv4.post_training.recipes import DistillRecipe, GRPORecipe
from dsv4.training.recipe import Section

PAGE = Path(__file__).resolve().parents[2] / "docs" / "post-training.md"


def keys(recipe: type[Section]) -> Iterator[tuple[str, str]]:
    """(section, key) of every value."""
    for name, section in sections(recipe):
        within = {inner for inner, _ in sections(section)}
        yield from ((name, key) for key in section.model_fields if key not in within)


def sections(recipe: type[Section]) -> Iterator[tuple[str, type[Section]]]:
    for name, field in recipe.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield name, field.annotation


@pytest.mark.parametrize("recipe", [GRPORecipe, DistillRecipe])
def test_the_page_has_every_key(recipe: type[Section]) -> None:
    """As `section.key`, or as `key` in a line that has the section's name before it."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    missing = [
        f"{section}.{key}"
        for section, key in keys(recipe)
        if not any(f"{section}.{key}" in line or (f"`{section}." in line and f"`{key}`" in line) for line in lines)
    ]
    assert missing == []
