"""Writing of solved problems."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from dsv4.post_training.domains.domain import Level
from dsv4.post_training.domains.solutions import write_conversations


def write_solutions(
    domain: str, out: Path, *, count: int, seed: int, thinking: bool | None, efforts: Sequence[str | int], level: Level
) -> None:
    """Write solved problems of a domain to a file of JSONL."""
    write_conversations(domain, out, count, seed, thinking, efforts, level)
    Console().print(f"{out}: {count:,} conversations of {domain}", highlight=False, soft_wrap=True)
