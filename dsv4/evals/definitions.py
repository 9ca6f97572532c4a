"""Multiple choice about definitions: the right one among others of its kind, by likelihood, in unseen wordings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from deepseek_recipe import Conversation, UserMessage

from dsv4.data.nano.definitions import unseen_wording
from dsv4.data.nano.entries import Entry
from dsv4.data.stable_hash import stable_hash
from dsv4.evals.intervals import wilson
from dsv4.evals.ledger import Ledger
from dsv4.evals.likelihood import log_likelihoods
from dsv4.model.transformer import Transformer
from dsv4.tokenizer.prompts import PromptEncoder

CHOICES = 4
NEUTRAL = "this"  # term of a question that says nothing of what is asked about
GROUP = 32  # questions whose result is kept together


@dataclass(frozen=True)
class Choice:
    """A question, its choices, and the place of the right one."""

    entry: Entry
    question: str
    neutral: str
    answers: tuple[str, ...]
    right: int


@dataclass(frozen=True)
class Choices:
    """Result for a set of questions."""

    name: str
    asked: int
    right: int

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson 95 % interval of the rate; chance is 1 / CHOICES."""
        return wilson(self.right, self.asked)


def make_choices(entries: Sequence[Entry], held_out: bool, count: int) -> list[Choice]:
    """Up to `count` questions about entries that training asked about, in other words, or never asked about."""
    asked = [entry for entry in entries if entry.held_out == held_out]
    asked = sorted(asked, key=lambda entry: stable_hash("asked", entry.kind, entry.term))[:count]
    found: list[Choice] = []
    for entry in asked:
        random = Random(stable_hash("choices", entry.kind, entry.term))
        others = [e for e in entries if e.kind == entry.kind and e.term != entry.term and e.held_out == held_out]
        if len(others) < CHOICES - 1:
            continue
        answers = [entry.answer, *(other.answer for other in random.sample(others, CHOICES - 1))]
        random.shuffle(answers)
        wording = unseen_wording(entry, 0)
        question, neutral = wording.format(entry.term), wording.format(NEUTRAL)
        found.append(Choice(entry, question, neutral, tuple(answers), answers.index(entry.answer)))
    return found


def choose(
    model: Transformer, prompts: PromptEncoder, name: str, choices: Sequence[Choice], ledger: Ledger | None = None
) -> Choices:
    """Choose by how much likelier an answer is after its question than after the neutral one.

    So an answer gains nothing by being short or common.
    """
    ledger = ledger or Ledger(None)
    right = 0
    for start in range(0, len(choices), GROUP):
        group = choices[start : start + GROUP]
        key = f"definitions {name} {len(choices)} {start}"
        found = ledger.get(key)
        if found is None:
            found = ledger.put(key, _count_right(model, prompts, group))
        right += found
    return Choices(name, len(choices), right)


def _count_right(model: Transformer, prompts: PromptEncoder, group: Sequence[Choice]) -> int:
    sequences: list[list[int]] = []
    starts: list[int] = []
    for choice in group:
        for question in (choice.question, choice.neutral):
            prompt = prompts.encode(Conversation([UserMessage(question)], thinking_mode=False))
            for answer in choice.answers:
                sequences.append([*prompt, *prompts.tokenizer.encode(answer)])
                starts.append(len(prompt))
    values = iter(log_likelihoods(model, sequences, starts))
    right = 0
    for choice in group:
        after, before = ([next(values) for _ in choice.answers] for _ in range(2))
        gains = [a - b for a, b in zip(after, before, strict=True)]
        right += gains.index(max(gains)) == choice.right
    return right


def to_lines(found: Sequence[Choices]) -> Iterator[str]:
    """Rows of a Markdown table."""
    yield "| definitions | questions | right | 95 % | chance |"
    yield "| --- | --- | --- | --- | --- |"
    for part in found:
        low, high = part.interval
        rate, ends = 100 * part.right / max(1, part.asked), f"{100 * low:.1f}-{100 * high:.1f}"
        yield f"| {part.name} | {part.asked} | {rate:.1f} % | {ends} | {100 / CHOICES:.0f} % |"
