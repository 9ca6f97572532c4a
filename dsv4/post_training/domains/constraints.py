"""Constraints on a text that a program checks exactly, each with its wording; and those that a given text fulfills."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from dsv4.post_training.answer_checks import fulfils

Value = int | str | dict[str, Any] | None
_WORD = re.compile(r"[A-Za-z]+(?:'[A-Za-z]+)?|\d+")
_END = re.compile(r"([.!?]+)")
_LETTER_OR_DIGIT = re.compile(r"[A-Za-z0-9]")


def words_of(text: str) -> list[str]:
    """Words and numbers; an apostrophe within a word belongs to it."""
    return _WORD.findall(text)


def sentences_of(text: str) -> list[str]:
    """Sentences: what ends with a period, an exclamation or a question mark, and holds a letter or digit."""
    parts = _END.split(text)  # one pattern for a whole sentence takes the cube of the length of a text without an end
    sentences = zip(parts[::2], parts[1::2], strict=False)
    return [f"{words}{end}".strip() for words, end in sentences if _LETTER_OR_DIGIT.search(words)]


def _lines(text: str) -> list[str]:
    return [line for line in text.strip().splitlines() if line.strip()]


def _has(text: str, word: str) -> int:
    return [found.lower() for found in words_of(text)].count(word.lower())


def _letters(text: str, value: str) -> bool:
    letter, count = value.split()
    return text.lower().count(letter) == int(count)


def _times(text: str, value: str) -> bool:
    word, count = value.split()
    return _has(text, word) == int(count)


@dataclass(frozen=True)
class Kind:
    """A kind of constraint: its wording, with {} for the value, and its check of (text, value)."""

    wording: str
    check: Callable[[str, Any], bool]


KINDS: dict[str, Kind] = {
    "words": Kind("Use exactly {} words.", lambda text, n: len(words_of(text)) == n),
    "words_least": Kind("Use at least {} words.", lambda text, n: len(words_of(text)) >= n),
    "words_most": Kind("Use at most {} words.", lambda text, n: len(words_of(text)) <= n),
    "sentences": Kind("Write exactly {} sentences.", lambda text, n: len(sentences_of(text)) == n),
    "lines": Kind("Write exactly {} lines.", lambda text, n: len(_lines(text)) == n),
    "bullets": Kind(
        'Write a list of exactly {} items, each on a line that begins with "- ", and nothing else.',
        lambda text, n: len(_lines(text)) == n and all(re.match(r"- \S", line) for line in _lines(text)),
    ),
    "letters": Kind('The letter "{}" must appear exactly {} times, in upper or lower case.', _letters),
    "include": Kind('Use the word "{}".', lambda text, word: _has(text, word) > 0),
    "include_times": Kind('Use the word "{}" exactly {} times.', _times),
    "avoid": Kind('Do not use the word "{}".', lambda text, word: not _has(text, word)),
    "avoid_letter": Kind('Do not use the letter "{}".', lambda text, letter: letter not in text.lower()),
    "lower": Kind("Write everything in lower case.", lambda text, _: text == text.lower() and text.islower()),
    "upper": Kind("Write everything in upper case.", lambda text, _: text == text.upper() and text.isupper()),
    "starts": Kind(
        'The first word must be "{}".', lambda text, word: [w.lower() for w in words_of(text)[:1]] == [word]
    ),
    "ends": Kind('End with the words "{}" and nothing after them.', lambda text, end: text.strip().endswith(end)),
    "no_commas": Kind("Do not use commas.", lambda text, _: "," not in text),
    "quoted": Kind(
        'Put the whole answer in double quotes ("like this").',
        lambda text, _: bool(re.fullmatch(r'"[^"]+"', text.strip())),
    ),
    "json": Kind("Answer with one JSON value, and nothing else, that fits this schema: {}", fulfils),
}
# Of one group a question has at most one: more would repeat each other.
GROUPS = ({"words", "words_least", "words_most"}, {"lines", "bullets"}, {"include", "include_times", "starts"})


@dataclass(frozen=True)
class Constraint:
    """One constraint. `value` is what its wording names: a number, a word, "word count", or a JSON schema as text."""

    kind: str
    value: int | str | None = None

    @property
    def wording(self) -> str:
        kind = KINDS[self.kind]
        if self.kind == "json":
            return kind.wording.format(self.value)
        parts = self.value.split() if kind.wording.count("{}") > 1 else [self.value]  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
        said = kind.wording.format(*parts)
        return re.sub(r"\b1 (word|sentence|line|item|time)s\b", r"1 \1", said)

    @property
    def note(self) -> str:
        """The constraint in short: `words: 5`, `lower`, `json: name, age`."""
        value = ", ".join(json.loads(str(self.value))["required"]) if self.kind == "json" else self.value
        kind = self.kind.replace("_", " ")
        return kind if value is None else f"{kind}: {value}"

    def holds(self, text: str) -> bool:
        """True if a text fulfills it; no empty text does."""
        value = json.loads(str(self.value)) if self.kind == "json" else self.value
        return bool(text.strip()) and KINDS[self.kind].check(text, value)


def constraints_of(text: str, avoided: str, rng: Random) -> list[Constraint]:
    """Constraints that a text fulfills. `avoided`: a word that is not in it."""
    words, lines = words_of(text), _lines(text)
    count, counts = len(words), Counter(word.lower() for word in words)
    word = rng.choice(sorted(counts))
    letter = rng.choice("aeiost")
    candidates = [
        Constraint("words", count),
        Constraint("words_least", max(1, count - rng.randint(0, 3))),
        Constraint("words_most", count + rng.randint(0, 3)),
        Constraint("sentences", len(sentences_of(text))),
        Constraint("lines", len(lines)),
        Constraint("bullets", len(lines)),
        Constraint("letters", f"{letter} {text.lower().count(letter)}"),
        Constraint("include", word),
        Constraint("include_times", f"{word} {counts[word]}"),
        Constraint("avoid", avoided),
        Constraint("avoid_letter", rng.choice("bcdfghjklmpuvwxyz")),
        Constraint("lower"),
        Constraint("upper"),
        Constraint("starts", words[0].lower()),
        Constraint("ends", " ".join(text.split()[-2:])),
        Constraint("no_commas"),
        Constraint("quoted"),
    ]
    return [one for one in candidates if one.value not in (0, f"{letter} 0") and one.holds(text)]
