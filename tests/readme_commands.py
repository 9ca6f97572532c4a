"""Fenced blocks of a Markdown page, and its `dsv4` commands read as a shell would."""

from __future__ import annotations

import re
import shlex


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, text) of every fenced block, "" where none is named."""
    return re.findall(r"^```(\w*)\n(.*?)^```", page, flags=re.S | re.M)


def commands(page: str) -> list[str]:
    """Every distinct `dsv4 ...` command: lines of fenced blocks without a language, and code spans."""
    plain = "".join(text for language, text in blocks(page) if not language)
    prose = re.sub(r"^```.*?^```", "", page, flags=re.S | re.M)
    spans = [" ".join(span.split()) for span in re.findall(r"`(dsv4\s[^`]+)`", prose)]  # one may run over a line's end
    return sorted({*re.findall(r"^(dsv4 .*)$", plain, flags=re.M), *spans})


def arguments(command: str) -> list[str]:
    """Arguments that the command hands to `dsv4.cli`, without a comment at its end."""
    return shlex.split(command, comments=True)[1:]
