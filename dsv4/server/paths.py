"""Base paths of OpenAI's and Anthropic's APIs, as clients expect them."""

from __future__ import annotations

from collections.abc import Sequence

OPENAI_BASES = ("/v1", "", "/beta", "/beta/v1")
ANTHROPIC_BASES = ("/v1", "/anthropic/v1", "/anthropic")


def under(bases: Sequence[str], path: str) -> tuple[str, ...]:
    """`path` under each base."""
    return tuple(base + path for base in bases)
