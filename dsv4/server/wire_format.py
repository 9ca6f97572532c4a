"""WireFormat: one API on the wire, and all that differs between two of them.

A format has no state and serves every request of its API. What it has read of one request is a WireRequest: it knows
how to become a prompt, and how to word the answer, streamed or whole. Nothing outside a format asks which one it is.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import deepseek_recipe as recipe

from dsv4.conversation.model import ConversationModel
from dsv4.conversation.turn import Turn
from dsv4.engine import Timings, TokenEvent
from dsv4.server.errors import RequestError
from dsv4.server.events import Event, comment
from dsv4.server.progress import Reports
from dsv4.server.unchecked_json import Json


class Chunk(Protocol):
    """A part of an answer, as its format words it."""

    def to_json(self) -> str: ...


class AnswerReader(Protocol):
    """Turns the token events of one answer into chunks."""

    timings: Timings | None  # of the latest event

    @property
    def finished(self) -> bool:
        """True once the answer is complete, which may be before its tokens end."""
        ...

    def push(self, event: TokenEvent) -> Sequence[Chunk]: ...


class WholeAnswer(Protocol):
    """The object that an answer's chunks add up to."""

    def accumulate(self, chunk: Any) -> None: ...

    def to_json(self) -> str: ...


@dataclass(frozen=True)
class WireRequest(ABC):
    """A request that its format has read, and found valid as far as can be told without the prompt's length."""

    model: str  # the name that the client used
    stream: bool
    reports: Reports

    @abstractmethod
    def turn(self, model: ConversationModel) -> Turn:
        """Renders and tokenizes the prompt. RequestError where the context cannot hold it."""

    @abstractmethod
    def count_tokens(self, model: ConversationModel) -> int:
        """Tokens of the rendered prompt, however many."""

    @abstractmethod
    def reader(self, model: ConversationModel, turn: Turn, answer_id: str) -> AnswerReader:
        """The reader of the answer to `turn`."""

    @abstractmethod
    def whole_answer(self, turn: Turn, answer_id: str) -> WholeAnswer:
        """The answer to `turn` before its first chunk."""


class WireFormat(ABC):
    """One API. Errors and keep-alives are DeepSeek's (and OpenAI's) unless a format has its own."""

    name: ClassVar[str]  # in the log
    paths: ClassVar[tuple[str, ...]]  # where a POST is answered
    count_tokens_paths: ClassVar[tuple[str, ...]] = ()  # where a POST is counted

    def matches(self, path: str) -> bool:
        """True for a path whose clients read this format's errors."""
        return path in self.paths or path in self.count_tokens_paths

    @abstractmethod
    def read(self, body: bytes, options: recipe.ConversionOptions) -> WireRequest:
        """Reads a request's body. RequestError with the fault's place. `options`: model names, thinking by default."""

    def token_count(self, count: int) -> Json:
        """The answer of `count_tokens_paths`."""
        raise NotImplementedError(f"{self.name} has no token counting")

    @abstractmethod
    def event(self, chunk: Chunk) -> Event:
        """A chunk as an event of a stream."""

    def last_words(self) -> bytes:
        """The bytes after the last event of a complete stream."""
        return b""

    def ping(self) -> bytes:
        """The bytes that keep a silent stream alive."""
        return comment("keep-alive")

    def error_body(self, error: RequestError) -> Json:
        """The JSON of an error response."""
        return {"error": error.as_object()}

    def error_event(self, error: RequestError) -> Event:
        """The event that ends a stream with an error."""
        return Event(json.dumps(self.error_body(error)))
