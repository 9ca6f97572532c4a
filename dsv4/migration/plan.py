"""Plan of a migration: the findings of one file, its new text, and the difference as a unified diff."""

from __future__ import annotations

import difflib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dsv4.migration.files import SourceFile
from dsv4.migration.rules import Finding, Wishes, find
from dsv4.migration.syntax import Syntax


@dataclass(frozen=True)
class FilePlan:
    source: SourceFile
    changes: Sequence[tuple[int, Finding]]  # with the numbers of their lines
    notes: Sequence[tuple[int, Finding]]

    @property
    def new_text(self) -> str:
        text, end, parts = self.source.text, 0, list[str]()
        for _, change in self.changes:
            parts += [text[end : change.start], change.new or ""]
            end = change.end
        return "".join([*parts, text[end:]])

    def diff(self, name: str) -> str:
        """Unified diff from a/name to b/name."""
        old, new = _lines(self.source.text), _lines(self.new_text)
        lines = difflib.unified_diff(old, new, f"a/{name}", f"b/{name}")
        return "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines)

    def write(self) -> None:
        """Replaces the file, whole or not at all; its permissions stay. ValueError if it has changed meanwhile."""
        from dsv4.checkpoint.atomic import new_file

        path = self.source.path.resolve()
        if path.read_bytes() != self.source.text.encode():
            raise ValueError(f"{path} has changed since it was read; run dsv4 migrate again")
        with new_file(path) as temporary:
            temporary.write_bytes(self.new_text.encode())
            shutil.copymode(path, temporary)


def plan_file(source: SourceFile, wishes: Wishes) -> FilePlan:
    if "deepseek" not in source.text.lower() and "reasoning_content" not in source.text:
        return FilePlan(source, [], [])
    syntax = Syntax(source.text, source.language)
    found = [(syntax.line(finding.start), finding) for finding in find(syntax, wishes)]
    changes = [(line, finding) for line, finding in found if finding.new is not None]
    return FilePlan(source, changes, [(line, finding) for line, finding in found if finding.new is None])


def display_name(path: Path) -> str:
    """Path from the working folder, if it lies there."""
    resolved, here = path.resolve(), Path.cwd()
    return (resolved.relative_to(here) if resolved.is_relative_to(here) else path).as_posix()


def _lines(text: str) -> list[str]:
    """Lines as patch knows them, each with its end."""
    lines = text.split("\n")
    return [line + "\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])
