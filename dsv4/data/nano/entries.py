"""Definitions that a corpus of dictionaries and manuals explains: term, kind, one plain sentence."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dsv4.data.stable_hash import stable_hash

MOST_CHARACTERS = 110
LEAST_CHARACTERS = 12
HELD_OUT = 12  # one entry in HELD_OUT is never asked about in training
WORDS = 6000  # of WordNet, the most frequent of the corpus
TERMS = 2500  # of foldoc, the shortest
_MANUALS = ("manuals/manpages.jsonl", "manuals/manpages-dev.jsonl", "manuals/git-doc.jsonl")
_PAGE = re.compile(r"NAME\n+\s*([\w.+-]+)(?:, [^\n]*?)? - ([^\n]+)\n")
_SENSE = re.compile(r"^\S[^\n]*\n {4}(n|v|adj|adv) 1: (.*?)(?:\n {4,9}(?:\w+ )?\d+: |\Z)", re.S)
_TERM = re.compile(r"^([^\n]+)\n\n {3}(?:<[^>]*> )?(.*)", re.S)


@dataclass(frozen=True)
class Entry:
    """A term and what it is. `kind`: noun, verb, adjective, term, command, function, page, element, acronym."""

    term: str
    kind: str
    meaning: str

    @property
    def held_out(self) -> bool:
        """True if training never asks about it."""
        return stable_hash("definition", self.kind, self.term) % HELD_OUT == 0

    @property
    def answer(self) -> str:
        """The meaning as a sentence."""
        return f"{self.meaning[0].upper()}{self.meaning[1:]}."


def read_entries(corpus: Path, counts: Counter[str]) -> list[Entry]:
    """Entries of the packages that the corpus has in its folder `train`, without duplicate terms or meanings.

    `counts`: how often each word occurs (`count_words`); nouns, verbs and adjectives come first, frequent ones before.
    """
    folder = corpus / "train"
    found = [*_words(folder, counts)]
    for read in (_terms, _pages, _elements, _acronyms):
        found += read(folder)
    terms, meanings = Counter(e.term for e in found), Counter(e.meaning for e in found)
    return [entry for entry in found if terms[entry.term] == 1 and meanings[entry.meaning] == 1]


def texts(path: Path) -> Iterator[str]:
    """Texts of a JSONL file; none if there is no such file."""
    if path.is_file():
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)["text"]


def count_words(corpus: Path) -> Counter[str]:
    """Lower-case words of the corpus's prose, dictionaries and manuals, with how often each occurs."""
    counts: Counter[str] = Counter()
    for group in ("prose", "dictionaries", "manuals"):
        for path in sorted((corpus / "train" / group).glob("*.jsonl")):
            for text in texts(path):
                counts.update(re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower()))
    return counts


def _plain(text: str) -> str | None:
    """The first sentence or clause on one line, without markup; None unless it is short and ordinary."""
    text = " ".join(re.sub(r"\[[^\]]*\]|\{|\}", "", text).split())
    text = re.split(r"; |\. |: |, especially| \(|\.$", text)[0].strip(" ,.;:")
    ordinary = re.fullmatch(r"[A-Za-z][A-Za-z0-9 ,'\"/()-]*", text)
    if re.search(r"\b(and|or|of|the|a|an|to|in|for|with|by|as)$", text):
        return None  # cut within a phrase
    return text if ordinary and LEAST_CHARACTERS <= len(text) <= MOST_CHARACTERS else None


def _words(folder: Path, counts: Counter[str]) -> Iterator[Entry]:
    """Frequent single words of WordNet, by their first sense."""
    kinds = {"n": "noun", "v": "verb", "adj": "adjective"}
    found: list[Entry] = []
    for text in texts(folder / "dictionaries" / "dict-wn.jsonl"):
        term, match = text.partition("\n")[0], _SENSE.match(text)
        if match is None or match[1] not in kinds or not re.fullmatch(r"[a-z]{3,14}", term):
            continue
        meaning = _plain(match[2].split(' "')[0].split("; ")[0])
        if meaning and not re.search(rf"\b{term[:5]}", meaning):
            found.append(Entry(term, kinds[match[1]], meaning))
    found.sort(key=lambda entry: (-counts[entry.term], entry.term))
    yield from found[:WORDS]


def _terms(folder: Path) -> Iterator[Entry]:
    """Terms of computing with one short sense, of the Free On-line Dictionary of Computing."""
    found: list[Entry] = []
    for text in texts(folder / "dictionaries" / "dict-foldoc.jsonl"):
        match = _TERM.match(text)
        if match is None or re.match(r"\d\.", match[2]) or not re.fullmatch(r"[A-Za-z][\w /+.-]{2,24}", match[1]):
            continue
        meaning = _plain(match[2])
        if meaning and " " in meaning:
            found.append(Entry(match[1], "term", meaning))
    found.sort(key=lambda entry: (len(entry.term) + len(entry.meaning), entry.term))
    yield from found[:TERMS]


def _pages(folder: Path) -> Iterator[Entry]:
    """Commands, functions and other manual pages, by the line of their name."""
    sections = {"1": "command", "8": "command", "2": "function", "3": "function"}
    for name in _MANUALS:
        for text in texts(folder / name):
            section, match = re.match(r"[\w.+-]+\((\d)", text), _PAGE.search(text[:600])
            if section is None or match is None:
                continue
            meaning = _plain(match[2])
            if meaning:
                yield Entry(match[1], sections.get(section[1], "page"), meaning)


def _elements(folder: Path) -> Iterator[Entry]:
    """Chemical elements."""
    for text in texts(folder / "dictionaries" / "dict-elements.jsonl"):
        term, _, rest = text.partition("\n")
        meaning = _plain(" ".join(line for line in rest.splitlines() if not re.match(r"[A-Z][\w ]+: ", line)))
        if meaning:
            yield Entry(term, "element", meaning)


def _acronyms(folder: Path) -> Iterator[Entry]:
    """Acronyms of computing, with what they stand for."""
    for text in texts(folder / "dictionaries" / "dict-vera.jsonl"):
        term, _, rest = text.partition("\n")
        meaning = _plain(rest)
        if meaning and re.fullmatch(r"[A-Z]{2,7}", term) and " " in meaning:
            yield Entry(term, "acronym", meaning)
