"""Long texts to look things up in: haystacks, with facts and questions about them, and passages that come twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from reasoning_gym.cognition.needle_data import NAMES

KINDS = ("secret word", "password", "code word", "lucky word", "favourite word")
OTHERS = 3  # facts besides the one asked about, in the test
_ASKED = ("What is the {} of {}?", "Tell me the {} of {}.", "Which word is the {} of {}?")
ROOM = 64  # tokens kept for the template and a question

Count = Callable[[str], int]  # tokens of a text


@dataclass(frozen=True)
class Needle:
    """A fact to hide: `The secret word of Anna is river.`"""

    kind: str
    name: str
    word: str

    @property
    def sentence(self) -> str:
        return f"The {self.kind} of {self.name} is {self.word}."


@dataclass(frozen=True)
class Haystack:
    """A text, the question at its end and the word that answers it."""

    text: str
    question: str
    answer: str

    @property
    def prompt(self) -> str:
        return f"{self.text}\n\n{self.question}"


def people() -> list[str]:
    """Names that facts are about."""
    return sorted({name for name in NAMES if name.isascii() and name.isalpha() and 3 <= len(name) <= 6})


def draw_needles(random: Random, words: Sequence[str], count: int) -> list[Needle]:
    """Facts about different people, with different words."""
    chosen = zip(random.sample(people(), count), random.sample(list(words), count), strict=True)
    return [Needle(random.choice(KINDS), name, word) for name, word in chosen]


def hide(lines: Sequence[str], needles: Sequence[Needle], depths: Sequence[float]) -> str:
    """Text of `lines` with each fact as a line of its own, at its depth: 0 before the first line, 1 after the last."""
    at = [(round(depth * len(lines)), needle.sentence) for depth, needle in zip(depths, needles, strict=True)]
    found: list[str] = []
    for place in range(len(lines) + 1):
        found += [sentence for wanted, sentence in at if wanted == place]
        found += lines[place : place + 1]
    return "\n".join(found)


def conversation(random: Random, lines: Sequence[str], words: Sequence[str], questions: int) -> dict[str, Any]:
    """A haystack with `questions` facts at random depths; its turns ask about them in any order, in full sentences."""
    needles = draw_needles(random, words, questions)
    text = hide(lines, needles, [random.random() for _ in needles])
    random.shuffle(needles)
    messages: list[dict[str, Any]] = []
    for number, needle in enumerate(needles):
        question = random.choice(_ASKED).format(needle.kind, needle.name)
        content = f"{text}\n\n{question}" if number == 0 else question
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": needle.sentence}]
    return {"messages": messages}


def repeat(random: Random, lines: Sequence[str]) -> str:
    """Text of `lines` and of the same lines in another order: each can be foretold once it has begun again."""
    return "\n".join([*lines, *random.sample(lines, len(lines))])


def haystack(random: Random, lines: Sequence[str], words: Sequence[str], depth: float) -> Haystack:
    """A test: one fact at `depth`, OTHERS at random depths, and a question about the first."""
    needles = draw_needles(random, words, 1 + OTHERS)
    text = hide(lines, needles, [depth, *(random.random() for _ in range(OTHERS))])
    return Haystack(text, random.choice(_ASKED).format(needles[0].kind, needles[0].name), needles[0].word)


def fill(lines: Iterator[str], tokens: int, count: Count) -> list[str]:
    """Take lines of together at most `tokens` tokens, less the room for a question; StopIteration at their end."""
    found: list[str] = []
    left = tokens - ROOM
    while True:
        line = next(lines)
        left -= count(line) + 1
        if left < 0:
            return found
        found.append(line)


def split_lines(documents: Iterator[str], most: int = 400) -> Iterator[str]:
    """Lines of documents that are not blank, the long ones cut at `most` characters."""
    for text in documents:
        for line in text.splitlines():
            for start in range(0, len(line), most):
                if line[start : start + most].strip():
                    yield line[start : start + most]
