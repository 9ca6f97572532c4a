"""Samples of supervised fine-tuning: conversations in OpenAI's message format, as the model will see and write them.

Without tools a thinking model sees earlier turns without their thinking, so each assistant turn is a sample of its own;
with tools it keeps all thinking, and without thinking there is none to drop: then a conversation is one sample with
loss on every assistant turn (report, Interleaved Thinking). All samples of a conversation have its mode. A conversation
with a quick instruction is one sample, with loss on the answer to it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from dsv4.data.encoding import THINKS, Encoded, RecordEncoder, asks_quick_instruction, has_reasoning, is_learned
from dsv4.data.records import Entry, Record, RecordError, Source
from dsv4.tokenizer.prompts import PromptEncoder


@dataclass(frozen=True)
class Sample:
    """A sample of the conversation at `place`, up to message number `turn`: its tokens and mask."""

    place: str
    turn: int
    encoded: Encoded
    record: dict[str, Any]


@dataclass(frozen=True)
class Refusal:
    """A conversation, or one of its turns, that cannot be trained on, and why."""

    place: str
    reason: str


def split_turns(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The conversations, each ending with an assistant's message to learn, that are the samples of one."""
    if asks_quick_instruction(record):  # whose answer alone is learned
        return [record]
    messages = record["messages"]
    answers = [place for place, message in enumerate(messages) if message.get("role") == "assistant"]
    thinks = any(has_reasoning(messages[place]) for place in answers)
    tools = bool(record.get("tools")) and record.get("tool_choice") != "none"  # as the prompt has them
    answers = [place for place in answers if is_learned(messages[place])]
    ends = answers if thinks and not tools else answers[-1:]
    return [record | {"messages": messages[: end + 1], THINKS: thinks} for end in ends]


def read_samples(
    sources: Iterable[Source], prompts: PromptEncoder, max_tokens: int | None = None
) -> Iterator[Sample | Refusal]:
    """Samples of all conversations in order, and refusals in their places. `max_tokens`: of a sample; None: any."""
    encoder = RecordEncoder(prompts)
    for source in sources:
        for entry in source.entries():
            yield from _samples(entry, encoder, max_tokens)


def _samples(entry: Entry, encoder: RecordEncoder, max_tokens: int | None) -> Iterator[Sample | Refusal]:
    record = entry.record
    problem = _problem(record)
    if problem is not None:
        yield Refusal(entry.place, problem.removeprefix(f"{entry.place}: "))
        return
    assert isinstance(record, dict)
    turns = split_turns(record)
    said = ""
    for turn in turns:
        number = len(turn["messages"]) - 1
        sample = f"messages[{number}]: " if len(turns) > 1 else ""
        try:
            (encoded,) = encoder.encode([turn])
        except ValueError as error:
            if str(error) != said:  # later turns have the faults of earlier messages
                yield Refusal(entry.place, f"{sample}{error}")
            said = str(error)
            continue
        if not encoded.targets:
            yield Refusal(entry.place, f"{sample}no token has loss")
        elif max_tokens is not None and len(encoded.ids) > max_tokens:
            yield Refusal(entry.place, f"{sample}{len(encoded.ids)} tokens; allowed: {max_tokens}")
        else:
            yield Sample(entry.place, number, encoded, turn)


def _problem(record: Record | RecordError) -> str | None:
    """Reason not to train on a record; None if it is a conversation to train on."""
    if isinstance(record, RecordError):
        return str(record)
    if isinstance(record, str):
        return "a plain text; a conversation with messages is allowed"
    messages = record["messages"]
    if not all(isinstance(message, dict) for message in messages):
        return "messages holds something else than objects with a role"
    if not any(message.get("role") == "assistant" for message in messages):
        return "no message of the assistant, which would be trained on"
    if not any(message.get("role") == "assistant" and is_learned(message) for message in messages):
        return "all messages of the assistant have weight 0; at least one is trained on"
    return None


@dataclass(frozen=True)
class TurnSource:
    """The samples of a source as records, for the writer of shards; what cannot be trained on goes to `refusals`."""

    source: Source
    prompts: PromptEncoder
    max_tokens: int
    refusals: list[Refusal] = field(default_factory=list[Refusal], compare=False)

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def size(self) -> int:
        return self.source.size

    def digest(self) -> str:
        return f"{self.source.digest()} in samples of at most {self.max_tokens} tokens, each in its conversation's mode"

    def records(self, start: int = 0) -> Iterator[Record]:
        return (sample.record for sample in self._samples(start))

    def entries(self, start: int = 0) -> Iterator[Entry]:
        return (Entry(f"{sample.place}, messages[{sample.turn}]", sample.record) for sample in self._samples(start))

    def _samples(self, start: int) -> Iterator[Sample]:
        return itertools.islice(self._read(), start, None)

    def _read(self) -> Iterator[Sample]:
        self.refusals.clear()
        for item in read_samples([self.source], self.prompts, self.max_tokens):
            if isinstance(item, Sample):
                yield item
            else:
                self.refusals.append(item)
