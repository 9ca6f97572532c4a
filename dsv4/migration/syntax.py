"""Syntax of a source as far as a migration needs it: strings, brackets, and the named items between brackets.

Pygments finds the strings and comments of every language; items are `name=value` and `name: value` between commas.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from pygments.lexers import get_lexer_by_name  # pyright: ignore[reportUnknownVariableType]
from pygments.token import Comment, String

Kind = Literal["string", "comment", "code"]
_OPENING, _CLOSING = "([{", ")]}"
_SHORTHAND = ("javascript", "typescript")  # languages where {messages} means {messages: messages}
_PUNCTUATION = set("()[]{},;:")


@dataclass(frozen=True)
class Unit:
    """A string, a comment, or a word or sign of code."""

    start: int
    text: str
    kind: Kind

    @property
    def end(self) -> int:
        return self.start + len(self.text)


@dataclass(frozen=True)
class Item:
    """`name=value`, `name: value` or `"name": value` between brackets; in JavaScript `name` alone too."""

    name: str
    start: int  # of the name
    value: tuple[Unit, ...]

    @property
    def end(self) -> int:
        """End of the value."""
        return self.value[-1].end

    @property
    def text(self) -> str:
        """The value's code, without white space."""
        return "".join(unit.text for unit in self.value)


@dataclass(frozen=True)
class Group:
    """A pair of brackets and the units between them."""

    opening: int  # index of the bracket's unit
    closing: int
    bracket: str


class Syntax:
    def __init__(self, text: str, language: str) -> None:
        self.text = text
        self.language = language
        self.units = list(_units(text, language))
        self._starts = [unit.start for unit in self.units]
        self._items: dict[Group, dict[str, Item]] = {}

    def line(self, position: int) -> int:
        """Number of the line of a position, from 1."""
        return self.text.count("\n", 0, position) + 1

    def unit_at(self, position: int) -> Unit:
        return self.units[bisect.bisect_right(self._starts, position) - 1]

    @cached_property
    def groups(self) -> list[Group]:
        """All pairs of brackets that match, inner ones first."""
        groups: list[Group] = []
        stack: list[int] = []
        for i, unit in enumerate(self.units):
            if unit.kind != "code":
                continue
            if unit.text in _OPENING:
                stack.append(i)
            elif unit.text in _CLOSING and stack:
                start = stack.pop()
                if _OPENING.index(self.units[start].text) == _CLOSING.index(unit.text):
                    groups.append(Group(start, i, self.units[start].text))
        return groups

    def items(self, group: Group) -> dict[str, Item]:
        """Named items directly in a group."""
        if group not in self._items:
            self._items[group] = self._find_items(group)
        return self._items[group]

    @cached_property
    def _closings(self) -> dict[int, int]:
        return {group.opening: group.closing for group in self.groups}

    def _find_items(self, group: Group) -> dict[str, Item]:
        items: dict[str, Item] = {}
        current: list[Unit] = []
        i = group.opening + 1
        while i <= group.closing:
            unit = self.units[i]
            if i == group.closing or (unit.kind == "code" and unit.text in ",;"):
                if len(current) >= 3 and current[1].text in (":", "="):
                    name = current[0].text.strip("\"'`")
                    items.setdefault(name, Item(name, current[0].start, tuple(current[2:])))
                elif len(current) == 1 and self.language in _SHORTHAND and current[0].text.isidentifier():
                    items.setdefault(current[0].text, Item(current[0].text, current[0].start, tuple(current)))
                current = []
                i += 1
                continue
            last = self._closings.get(i, i)
            current += [part for part in self.units[i : last + 1] if part.kind != "comment"]
            i = last + 1
        return items


def _units(text: str, language: str) -> Iterator[Unit]:
    """Units in order; white space is left out, neighbouring parts of a string are one unit."""
    held: Unit | None = None
    for start, token, value in get_lexer_by_name(language).get_tokens_unprocessed(text):
        kind: Kind = "comment" if token in Comment or token in String.Doc else "string" if token in String else "code"
        if held is not None:
            if kind == held.kind and held.end == start:
                held = Unit(held.start, held.text + value, kind)
                continue
            yield held
            held = None
        if kind != "code":
            held = Unit(start, value, kind)
        elif set(value) <= _PUNCTUATION:
            yield from (Unit(start + i, sign, kind) for i, sign in enumerate(value))
        elif stripped := value.strip():
            yield Unit(start + value.index(stripped), stripped, kind)
    if held is not None:
        yield held
