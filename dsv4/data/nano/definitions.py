"""Questions about entries: wordings for training, and others, which training never has, for the test."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

from dsv4.data.nano.entries import Entry
from dsv4.data.stable_hash import stable_hash

_WORD = (
    *("What does {} mean?", "What is the meaning of {}?", "Define {}.", "What does the word {} mean?"),
    *("Tell me the meaning of {}.", "Meaning of {}?", "What is meant by {}?", "Explain the word {}."),
)
_THING = ("What is {}?", "Define {}.", "Tell me what {} is.", "Explain {}.", "What do you know about {}?", "{}?")
_COMMAND = (
    *("What does the command {} do?", "What is {} for?", "What does {} do?", "Explain the command {}."),
    *("Tell me what {} does.", "What can I do with {}?"),
)
_FUNCTION = ("What does the function {} do?", "What does {} do?", "Explain the function {}.", "What is {} for?")
_ACRONYM = ("What does {} stand for?", "What is {}?", "What does {} mean?", "Spell out {}.", "{} stands for what?")
TRAINED: dict[str, tuple[str, ...]] = {
    "noun": (*_WORD, "What is a {}?"), "verb": (*_WORD, "What does it mean to {}?"), "adjective": _WORD,
    "term": _THING, "page": _THING, "element": _THING,
    "command": _COMMAND, "function": _FUNCTION, "acronym": _ACRONYM,
}  # fmt: skip
_WORD_TEST = (
    *("Can you tell me what {} means?", "How would you define {}?", "Please explain what {} means."),
    "I do not know the word {}. What is it?",
)
_THING_TEST = ("Can you tell me what {} is?", "How would you describe {}?", "Please give me a definition of {}.")
TESTED: dict[str, tuple[str, ...]] = {
    "noun": _WORD_TEST, "verb": _WORD_TEST, "adjective": _WORD_TEST,
    "term": _THING_TEST, "page": _THING_TEST, "element": _THING_TEST,
    "command": ("Why would I run {}?", "Can you tell me what {} is used for?", "Please describe the command {}."),
    "function": ("Why would I call {}?", "Can you tell me what {} is used for?", "Please describe the function {}."),
    "acronym": ("Can you tell me what {} is short for?", "Which words is {} made of?", "Please write out {} in full."),
}  # fmt: skip
WORDINGS = 4  # per entry and copy of the training questions
THINKING = 0.4


def training_questions(entries: Sequence[Entry], seed: int) -> Iterator[dict[str, Any]]:
    """Conversations about the entries that are not held out, in a shuffled order; WORDINGS of each."""
    random = Random(stable_hash("definitions", seed))
    chosen: list[tuple[Entry, str]] = []
    for entry in entries:
        if not entry.held_out:
            wordings = TRAINED[entry.kind]
            chosen += [(entry, wording) for wording in random.sample(wordings, min(WORDINGS, len(wordings)))]
    random.shuffle(chosen)
    for entry, wording in chosen:
        answer: dict[str, Any] = {"role": "assistant", "content": entry.answer}
        if random.random() < THINKING:
            answer["reasoning_content"] = f"define {entry.term}"
        yield {"messages": [{"role": "user", "content": wording.format(entry.term)}, answer]}


def unseen_wording(entry: Entry, seed: int) -> str:
    """A question about an entry in words that training never has, with {} in the place of its term."""
    wordings = TESTED[entry.kind]
    return wordings[stable_hash("wording", entry.term, seed) % len(wordings)]
