"""Configurations of docs/clients.md: the fenced blocks below a heading, with the test server's address."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "clients.md"
ADDRESS = "http://localhost:8000"


@dataclass(frozen=True)
class Block:
    """`file`: of the line before it, "" where that names none."""

    language: str
    text: str
    file: str


def section_blocks(heading: str, url: str) -> list[Block]:
    """Blocks below `### heading`. KeyError if the page has none."""
    for section in re.split(r"^#{2,3} ", PAGE.read_text(encoding="utf-8"), flags=re.M):
        title, _, text = section.partition("\n")
        if title == heading:
            found = re.findall(r"(?:^`(~/[^`]+)`\n\n)?^```(\w+)\n(.*?)^```", text, flags=re.S | re.M)
            return [Block(language, block.replace(ADDRESS, url), file) for file, language, block in found]
    raise KeyError(f"{PAGE.name} has no section {heading!r}")
