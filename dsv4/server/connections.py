"""Connections with deadlines: for a request's head, its body, and a client that does not read its answer.

uvicorn has a deadline for idle connections only. ClientConnection subclasses uvicorn's h11 protocol: it gets the same
events and tracks their times.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time
from dataclasses import dataclass
from typing import Any, Literal, cast

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from dsv4.server.errors import RequestError
from dsv4.server.formats import format_of
from dsv4.server.request_log import new_id_headers

Phase = Literal["idle", "head", "body", "answer"]

_UNSENT_BYTES = 65536  # of an answer in the kernel's buffer before the server notices that the client does not read
MAX_HEAD_BYTES = 65536  # of a request: its line and its headers
_HEAD_END = re.compile(rb"\r?\n\r?\n")
_STALLED_SECONDS = 2.0  # a connection whose body has paused this long may be closed to make room


@dataclass(frozen=True)
class ClientLimits:
    """Deadlines for clients, in seconds.

    `client_seconds`: for the whole head of a request, between two pieces of its body, between two reads of an answer.
    A body must also arrive at `bytes_per_second` on average. `idle_seconds`: between two requests; more than the minute
    after which common proxies drop an idle connection, so that they never send on a connection that is closing.
    """

    client_seconds: float = 60.0
    idle_seconds: float = 75.0
    bytes_per_second: int = 1024

    def __post_init__(self) -> None:
        for name in ("client_seconds", "idle_seconds", "bytes_per_second"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: more than 0")


class ServingClock:
    """Clock of the time during which the event loop ran: time that it was blocked does not count against clients."""

    def __init__(self) -> None:
        self.seconds = 0.0

    async def tick(self, interval: float) -> None:
        """Sleeps `interval` seconds and advances the clock by exactly that, however late it wakes."""
        await asyncio.sleep(interval)
        self.seconds += interval


class ClientConnection(H11Protocol):
    """uvicorn's connection that also tracks its phase and the time of the client's last data."""

    def __init__(
        self, limits: ClientLimits, clock: ServingClock, config: Config, server_state: ServerState, **options: Any
    ) -> None:
        super().__init__(config=config, server_state=server_state, **options)
        self._limits, self._clock = limits, clock
        self._since = self._last_data = self._unsent_since = clock.seconds
        self._received = self._unsent = 0
        self.last_seen = time.monotonic()  # monotonic, to find the idlest connection; deadlines use the clock
        self._has_head_part = False

    @property
    def phase(self) -> Phase:
        """Phase of the connection: waiting for a request, the rest of its head or body, or the server's answer."""
        state = self.conn.their_state
        answering = not self._is_new and not self.cycle.response_complete
        if state is h11.SEND_BODY:
            return "body"
        if state is h11.IDLE and not answering:
            return "head" if self._has_head_part else "idle"
        return "answer"

    @property
    def waiting_seconds(self) -> float:
        """Seconds since the client last sent data or the phase changed."""
        return self._clock.seconds - max(self._since, self._last_data)

    @property
    def gives_way(self) -> bool:
        """True if the connection may be closed to make room: idle with nothing left to send, in a head, or stalled."""
        phase = self.phase
        if phase == "body":
            return self.waiting_seconds >= _STALLED_SECONDS
        return phase != "answer" and self.transport.get_write_buffer_size() == 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # A peer that vanished, or a receive window that stays shut, also ends the connection.
        timeout = int(self._limits.client_seconds * 1000)
        _set_option(transport, "TCP_USER_TIMEOUT", timeout)
        _set_option(transport, "TCP_NOTSENT_LOWAT", _UNSENT_BYTES)

    def data_received(self, data: bytes) -> None:
        before = self.phase
        self.last_seen = time.monotonic()
        self._last_data = self._clock.seconds
        self._received += len(data)
        super().data_received(data)
        self._look_for_a_head()
        if self.phase != before:
            self._since, self._received = self._clock.seconds, 0

    def handle_events(self) -> None:
        """Refuses a head that is too large, one that came behind another request too."""
        if self.conn.their_state is h11.IDLE and self._head_is_too_large():
            self._refuse(431, f"The head of the request has more than {MAX_HEAD_BYTES} bytes")
        else:
            super().handle_events()

    def on_response_complete(self) -> None:
        self.last_seen = time.monotonic()
        self._since = self._clock.seconds
        super().on_response_complete()  # starts the next request if it is already here
        self._look_for_a_head()

    def check(self) -> None:
        """Ends the connection if its client is overdue."""
        if self._reader_is_stuck():
            self.transport.abort()
            return
        message = self._overdue()
        if message is not None and not self.transport.is_closing():
            self._refuse(408, message)

    def send_400_response(self, msg: str) -> None:
        """Overrides uvicorn's answer to invalid HTTP: it gets the shape of every other error."""
        self._refuse(400, msg)

    def _overdue(self) -> str | None:
        """Message for a client that missed a deadline, "" for closing without an answer; None if it is in time."""
        limits, phase = self._limits, self.phase
        waited = self._clock.seconds - self._since
        if phase == "head" and waited > limits.client_seconds:
            return f"The head of the request did not come within {limits.client_seconds:g} s"
        if phase == "idle" and waited > (limits.client_seconds if self._is_new else limits.idle_seconds):
            return ""
        if phase == "body":
            if self.flow.read_paused:  # the server has not consumed the received data: the client cannot send
                self._last_data = self._clock.seconds
            if self.waiting_seconds > limits.client_seconds:
                return f"Nothing of the request's body came for {limits.client_seconds:g} s"
            if waited > limits.client_seconds + self._received / limits.bytes_per_second:
                return f"The request's body came at less than {limits.bytes_per_second} bytes per second"
        return None

    @property
    def _is_new(self) -> bool:
        return cast(object, self.cycle) is None

    def _head_is_too_large(self) -> bool:
        """True if what has come begins with a head over the limit, whole or not; a body behind it does not count."""
        come = self.conn.trailing_data[0]
        if len(come) <= MAX_HEAD_BYTES:
            return False
        end = _HEAD_END.search(come)
        return end is None or end.start() > MAX_HEAD_BYTES

    def _look_for_a_head(self) -> None:
        self._has_head_part = self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])

    def _reader_is_stuck(self) -> bool:
        """True if the write buffer has not shrunk within `client_seconds`; timed only while nothing is added to it."""
        size = self.transport.get_write_buffer_size()
        settled = self.flow.write_paused or self.transport.is_closing() or self.phase == "idle"
        if size == 0 or size < self._unsent or not settled:
            self._unsent_since = self._clock.seconds
        self._unsent = size
        return self._clock.seconds - self._unsent_since > self._limits.client_seconds

    def _refuse(self, status: int, message: str) -> None:
        """Closes the connection, with an error response if the answer has not begun."""
        if message and self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.write(self._error(status, message))
        if not self._is_new:  # discards what the application still sends
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    def _error(self, status: int, message: str) -> bytes:
        # In the default format: the path may not have arrived yet.
        error = RequestError(status, message)
        body = json.dumps(format_of("").error_body(error)).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        headers += [*error.response_headers().items(), *new_id_headers()]
        events = [h11.Response(status_code=status, headers=headers), h11.Data(data=body), h11.EndOfMessage()]
        return b"".join(self.conn.send(event) or b"" for event in events)


def _set_option(transport: asyncio.Transport, name: str, value: int) -> None:
    """Sets a TCP option of a connection if the system has it."""
    option: int | None = getattr(socket, name, None)
    connection: socket.socket = transport.get_extra_info("socket")
    if option is not None and connection.family in (socket.AF_INET, socket.AF_INET6):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
