"""Messages between a server and its engine process, and the link that carries them.

Both ends are the same version of this package on one machine, and nobody else has the sockets: messages are pickled.
Events are packed to plain tuples, which takes a fraction of the time: there is one for each token.
"""

from __future__ import annotations

import pickle
import socket
import threading
from array import array
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any, cast

from dsv4.engine.errors import QueueFullError
from dsv4.engine.fairness import User
from dsv4.engine.outputs import ProgressEvent, Timings, TokenEvent
from dsv4.engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from dsv4.engine.interface import Engine

PackedEvent = tuple[Any, ...]

_LENGTH_BYTES = 8
_JOINED_BYTES = 1 << 16  # shorter messages are sent at once with their length
_READ_BYTES, _MOST_READ_BYTES = 1 << 14, 1 << 22


@dataclass(frozen=True)
class EngineState:
    """Counts of an engine after a step. `full`: why no further request may wait, None while one may."""

    num_running: int = 0
    num_waiting: int = 0
    full: str | None = None
    num_steps: int = 0

    @classmethod
    def of(cls, engine: Engine) -> EngineState:
        """The state of an engine as it is now."""
        full = None
        try:
            engine.check_room()
        except QueueFullError as error:
            full = str(error)
        return cls(engine.num_running, engine.num_waiting, full, engine.num_steps)


# From the server.


@dataclass(frozen=True)
class Load:
    """The first message: `make` returns the LLM. `log_level`: of the records that are sent back."""

    make: Callable[[], Any]
    log_level: int


@dataclass(frozen=True)
class Reserve:
    """Validates a request and keeps it a place in the queue. Answered by a Reply."""

    id: int
    prompt_token_ids: array[int] | list[int]
    params: SamplingParams
    user: User


@dataclass(frozen=True)
class Start:
    """Submits a reserved request."""

    id: int
    watched: bool


@dataclass(frozen=True)
class Drop:
    """Stops a request or a trace, or gives a request's place back. No answer; nothing happens where it has ended.

    `complete`: all that was wanted of the request has come.
    """

    id: int
    complete: bool = False


@dataclass(frozen=True)
class CollectMetrics:
    """Answered by a Reply with the list of metrics."""

    id: int


@dataclass(frozen=True)
class Trace:
    """Answered by a Reply with the TokenTrace of the last of the tokens."""

    id: int
    token_ids: array[int] | list[int]


@dataclass(frozen=True)
class Close:
    """Ends the engine after its running step. No answer but the end of the process."""


# From the engine process.


@dataclass(frozen=True)
class Ready:
    """The model is loaded."""

    model: Any  # a served_model.ModelFacts


@dataclass(frozen=True)
class LoadFailed:
    error: Any  # a portable_errors.PortableError


@dataclass(frozen=True)
class Reply:
    """Result of a call: a value, or a portable_errors.PortableError that it has raised."""

    id: int
    value: Any
    error: Any
    state: EngineState


@dataclass(frozen=True)
class Events:
    """Events of a step: (request id, packed event) pairs."""

    events: list[tuple[int, PackedEvent]]
    state: EngineState


@dataclass(frozen=True)
class Failed:
    """A request has ended with an error of its own, a portable_errors.PortableError."""

    id: int
    error: Any


@dataclass(frozen=True)
class LogRecord:
    """A record of the process's logging, with its message formatted."""

    fields: dict[str, Any]


@dataclass(frozen=True)
class Stopped:
    """The engine has failed with an exception. `lasting`: it would fail again with these weights."""

    reason: str
    lasting: bool


class Link:
    """One end of the connection. `send` is safe from any thread, `receive` for one.

    A message is its length, 8 bytes, and its pickle. A step's Events go as a plain tuple, without the names of classes.
    """

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._sending = threading.Lock()
        self._received = bytearray()  # that no message was made of yet

    def send(self, message: object) -> None:
        """OSError if the other end is gone."""
        if isinstance(message, Events):
            state = message.state
            message = message.events, state.num_running, state.num_waiting, state.full, state.num_steps
        data = pickle.dumps(message, protocol=5)
        head = len(data).to_bytes(_LENGTH_BYTES, "little")
        with self._sending:
            if len(data) < _JOINED_BYTES:
                self._socket.sendall(head + data)
            else:
                self._socket.sendall(head)
                self._socket.sendall(data)

    def receive(self) -> object:
        """The next message; EOFError or OSError if the other end is gone."""
        size = int.from_bytes(self._take(_LENGTH_BYTES), "little")
        message: object = pickle.loads(self._take(size))
        if isinstance(message, tuple):
            events, *state = cast("tuple[Any, ...]", message)
            return Events(events, EngineState(*state))
        return message

    def close(self) -> None:
        self._socket.close()

    def _take(self, count: int) -> bytes:
        """The next bytes; one call of the system has several short messages."""
        received = self._received
        while len(received) < count:
            part = self._socket.recv(max(_READ_BYTES, min(count - len(received), _MOST_READ_BYTES)))
            if not part:
                raise EOFError
            received += part
        taken = bytes(received[:count])
        del received[:count]
        return taken


def pack_tokens(token_ids: list[int]) -> array[int] | list[int]:
    """Token ids as an array, which is sent at once; as they are where one is no 64-bit number."""
    try:
        return array("q", token_ids)
    except (OverflowError, TypeError):
        return token_ids


def pack(event: TokenEvent | ProgressEvent) -> PackedEvent:
    if isinstance(event, ProgressEvent):
        return astuple(event)
    timings = event.timings
    return (
        event.token_ids,
        event.text,
        event.logprobs,
        event.top_logprobs,
        event.finish_reason,
        event.cached_tokens,
        timings
        and (
            timings.queue_seconds,
            timings.prefill_seconds,
            timings.decode_seconds,
            timings.num_prompt_tokens,
            timings.num_cached_tokens,
            timings.num_output_tokens,
            timings.num_draft_tokens,
            timings.num_accepted_tokens,
        ),
        event.prompt_logprobs,
        event.prompt_top_logprobs,
        event.num_accepted_tokens,
    )


def unpack(packed: PackedEvent) -> TokenEvent | ProgressEvent:
    if not isinstance(packed[0], list):
        return ProgressEvent(*packed)
    timings = packed[6]
    return TokenEvent(
        *packed[:6],
        timings=timings and Timings(*timings),
        prompt_logprobs=packed[7],
        prompt_top_logprobs=packed[8],
        num_accepted_tokens=packed[9],
    )
