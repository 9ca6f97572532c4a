"""Base addresses under which clients look for the APIs of OpenAI's and of Anthropic's style."""

from __future__ import annotations

from collections.abc import Sequence

OPENAI_BASES = ("/v1", "", "/beta", "/beta/v1")
ANTHROPIC_BASES = ("/v1", "/anthropic/v1", "/anthropic")


def under(bases: Sequence[str], path: str) -> tuple[str, ...]:
    """The path under each of the bases."""
    return tuple(base + path for base in bases)
