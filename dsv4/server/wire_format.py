"""WireFormat: one HTTP API; everything specific to an API is behind this interface.

A format has no state and serves every request of its API. It parses a request body to a WireRequest, which renders the
prompt and serializes the answer, streamed or whole. Nothing outside a format depends on which format it is.
"""

from __future__ import annotations

import json
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import deepseek_recipe as recipe
from pydantic import BaseModel

from dsv4.conversation.model import ConversationModel
from dsv4.conversation.turn import Turn
from dsv4.engine import Timings, TokenEvent
from dsv4.engine.outputs import EndReason
from dsv4.server.errors import RequestError
from dsv4.server.events import Event, comment
from dsv4.server.progress import Reports
from dsv4.server.unchecked_json import Json


class Chunk(Protocol):
    """A part of an answer in its wire format."""

    def to_json(self) -> str: ...


class AnswerReader(Protocol):
    """Turns the token events of one answer into chunks."""

    @property
    def timings(self) -> Timings | None:
        """Of the latest event."""
        ...

    @property
    def finished(self) -> bool:
        """True once the answer is complete, maybe before its tokens end."""
        ...

    @property
    def end_reason(self) -> EndReason | None:
        """What has ended a finished answer, as its client is told; None before."""
        ...

    @property
    def num_tokens(self) -> int:
        """Tokens of the answer so far, as its usage counts them: without those behind its end."""
        ...

    @property
    def num_reasoning_tokens(self) -> int:
        """Those of them that were sampled before the end of the reasoning."""
        ...

    def push(self, event: TokenEvent) -> Sequence[Chunk]: ...


class OuterReader:
    """A reader over another, whose chunks it completes: it counts as that one does."""

    def __init__(self, inner: AnswerReader) -> None:
        self._inner = inner

    @property
    def timings(self) -> Timings | None:
        return self._inner.timings

    @property
    def finished(self) -> bool:
        return self._inner.finished

    @property
    def end_reason(self) -> EndReason | None:
        return self._inner.end_reason

    @property
    def num_tokens(self) -> int:
        return self._inner.num_tokens

    @property
    def num_reasoning_tokens(self) -> int:
        return self._inner.num_reasoning_tokens


class WholeAnswer(Protocol):
    """Accumulates an answer's chunks to one response object."""

    def accumulate(self, chunk: Any) -> None: ...

    def to_json(self) -> str: ...


@dataclass(frozen=True)
class WireRequest(ABC):
    """A parsed request, validated except for the prompt's length."""

    model: str  # the client's name for the model
    stream: bool
    reports: Reports

    @property
    def user(self) -> str | None:
        """Id of the client's user, where the format has one."""
        return None

    @property
    def cache_salt(self) -> str | None:
        """Further salt of the request's prefixes, which separates them from those of others."""
        return None

    @abstractmethod
    def turn(self, model: ConversationModel) -> Turn:
        """Renders and tokenizes the prompt. RequestError if it exceeds the context."""

    def turns(self, model: ConversationModel) -> Sequence[Turn]:
        """One turn per answer of the request; most formats have one."""
        return [self.turn(model)]

    @property
    def answers_per_prompt(self) -> int:
        """Successive turns that have the same prompt, which counts once."""
        return 1

    def prompt_counts(self, turns: Sequence[Turn]) -> list[int]:
        """Tokens of each turn's prompt as they count: 0 for a further answer to a prompt."""
        return [0 if i % self.answers_per_prompt else len(turn.prompt_token_ids) for i, turn in enumerate(turns)]

    @abstractmethod
    def count_tokens(self, model: ConversationModel) -> int:
        """Number of tokens of the rendered prompt, without a limit."""

    @abstractmethod
    def reader(self, model: ConversationModel, turn: Turn, answer_id: str) -> AnswerReader:
        """Reader of the answer to `turn`."""

    def readers(self, model: ConversationModel, turns: Sequence[Turn], answer_id: str) -> Sequence[AnswerReader]:
        """Reader of each answer."""
        return [self.reader(model, turn, answer_id) for turn in turns]

    @abstractmethod
    def whole_answer(self, turn: Turn, answer_id: str) -> WholeAnswer:
        """Empty accumulator for the request's answers, of which the first is to `turn`."""


class WireFormat(ABC):
    """One API. Errors and keep-alives are DeepSeek's (and OpenAI's) unless a format overrides them."""

    name: ClassVar[str]  # for the log
    paths: ClassVar[tuple[str, ...]]  # of POST requests for an answer
    count_tokens_paths: ClassVar[tuple[str, ...]] = ()  # of POST requests for a token count
    request_schema: ClassVar[type[BaseModel] | None] = None  # for the OpenAPI document; None: any object
    answer_schema: ClassVar[type[BaseModel] | None] = None
    count_tokens_schema: ClassVar[type[BaseModel] | None] = None  # of a request for a token count
    token_count_schema: ClassVar[type[BaseModel] | None] = None
    format_field: ClassVar[str] = "response_format"  # of a request, which says the form of the answer's text

    def matches(self, path: str) -> bool:
        """True for a path whose clients read this format's errors."""
        return path in self.paths or path in self.count_tokens_paths

    @abstractmethod
    def read(self, body: bytes, options: recipe.ConversionOptions) -> WireRequest:
        """Parses a request's body. RequestError with the fault's place. `options`: model names, default of thinking."""

    def token_count(self, count: int) -> Json:
        """Response body of `count_tokens_paths`."""
        raise NotImplementedError(f"{self.name} has no token counting")

    @abstractmethod
    def event(self, chunk: Chunk) -> Event:
        """Stream event of a chunk."""

    def last_words(self) -> bytes:
        """Bytes after the last event of a complete stream."""
        return b""

    def ping(self) -> bytes:
        """Bytes that keep a silent stream alive."""
        return comment("keep-alive")

    def new_id(self) -> str:
        """Id of a new answer."""
        return str(uuid.uuid4())

    def error_body(self, error: RequestError) -> Json:
        """Body of an error response, as JSON."""
        return {"error": error.as_object()}

    def error_event(self, error: RequestError) -> Event:
        """Event that ends a stream with an error."""
        return Event(json.dumps(self.error_body(error)))

    def failure(self, error: RequestError, reader: AnswerReader) -> Event:
        """Event that ends the stream of the answer read by `reader` with an error."""
        return self.error_event(error)
