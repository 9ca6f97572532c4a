"""HttpServer: uvicorn with a connection limit, deadlines for clients, and a graceful shutdown."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import sys
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from dsv4.notices import SparseLog
from dsv4.server.connections import MAX_HEAD_BYTES, ClientConnection, ClientLimits, ServingClock
from dsv4.server.drain import Drain
from dsv4.server.error_responses import error_response
from dsv4.server.errors import RequestError, retry_after
from dsv4.server.open_files import OVERFLOW
from dsv4.server.request_log import RequestIdMiddleware

logger = logging.getLogger("dsv4.server")

_LAST_WORDS_SECONDS = 0.5  # time for cut-off answers to send their error
_NO_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class HttpServer(uvicorn.Server):
    """Serves an application on a listening socket.

    SIGTERM or Ctrl-C: `drain` begins, open requests get its grace period, streams still open after it end with an
    error event, `run` returns. A second signal ends the process at once.
    """

    def __init__(
        self, app: ASGIApp, listening: socket.socket, drain: Drain, limits: ClientLimits, max_connections: int
    ) -> None:
        config = uvicorn.Config(
            app,
            http="h11",
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,  # of a head in pieces; the default is a quarter
            ws="none",  # a connection upgraded to another protocol has no deadlines
            lifespan="off",
            log_level="error",  # clients' errors are reported to them only: no client can fill the log
            access_log=False,
            timeout_keep_alive=max(1, round(limits.idle_seconds)),
            timeout_graceful_shutdown=1,
        )
        super().__init__(config)
        self._listening, self._drain, self._limits = listening, drain, limits
        self._max_connections = max_connections
        self._clock = ServingClock()
        self._log = SparseLog(logger)
        self._jobs: list[asyncio.Task[None]] = []
        self._signalled = False
        self.on_ready: Callable[[], None] = lambda: None  # called once requests are accepted

    def stop(self) -> None:
        """Begins to stop the server; for any thread."""
        self._drain.begin()
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=[])  # this class accepts connections itself, to enforce the limit
        self._listening.setblocking(False)
        self._listening.listen(1024)
        self._jobs = [asyncio.create_task(self._accept_forever()), asyncio.create_task(self._watch_clients())]
        self.on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Waits for open requests, cuts off the rest, and closes the server."""
        self._drain.begin()
        if self._signalled and not self.server_state.tasks:
            print("Stopping; a second signal stops at once", file=sys.stderr)
        elif self.server_state.tasks:
            print(
                f"Stopping: open requests get {self._drain.remaining:.0f} s to end; a second signal stops at once",
                file=sys.stderr,
            )
        await self._wait_for_requests(self._drain.remaining)
        self._drain.cut()
        self._abort(lambda connection: connection.phase != "answer")  # incomplete requests get no answer
        await self._wait_for_requests(_LAST_WORDS_SECONDS)
        self._abort(lambda connection: connection.phase != "idle")
        await self._wait_for_requests(_LAST_WORDS_SECONDS)
        for job in self._jobs:
            job.cancel()
        await asyncio.gather(*self._jobs, return_exceptions=True)
        self._listening.close()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            os._exit(128 + sig)  # an engine step may take long, and its result is no longer needed
        self._signalled = True
        self._drain.begin()
        self.should_exit = True

    async def _wait_for_requests(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self.server_state.tasks and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    def _abort(self, chosen: Callable[[ClientConnection], bool]) -> None:
        for connection in self._connections():
            if chosen(connection):
                connection.transport.abort()

    async def _watch_clients(self) -> None:
        interval = min(1.0, self._limits.client_seconds / 4, self._limits.idle_seconds / 4)
        while True:
            await self._clock.tick(interval)
            for connection in self._connections():
                connection.check()

    async def _accept_forever(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while len(self.server_state.connections) >= self._max_connections + OVERFLOW:
                await asyncio.sleep(0.05)  # new clients wait in the kernel's queue
            try:
                client, _ = await loop.sock_accept(self._listening)
            except OSError as error:  # the client failed or file descriptors ran out: neither ends the server
                if error.errno in _NO_RESOURCES:
                    self._close_idlest()
                    self._log.warn(f"cannot accept connections: {error.strerror}; raise ulimit -n")
                await asyncio.sleep(0.1)
                continue
            connection = self._new_connection(full=not self._make_room())
            try:
                await loop.connect_accepted_socket(lambda connection=connection: connection, client)
            except OSError:
                client.close()

    def _new_connection(self, full: bool) -> ClientConnection:
        connection = ClientConnection(
            self._limits,
            self._clock,
            self.config,
            self.server_state,
            app_state=self.lifespan.state,
            _loop=asyncio.get_running_loop(),
        )
        if full:
            connection.app = _full  # pyright: ignore[reportAttributeAccessIssue]  # uvicorn's own name for ASGIApp
        return connection

    def _make_room(self) -> bool:
        """True if one more connection is within the limit, if need be after closing the idlest connection."""
        if len(self.server_state.connections) < self._max_connections or self._close_idlest():
            return True
        self._log.warn(f"all {self._max_connections} connections are in use; new ones are answered 503")
        return False

    def _close_idlest(self) -> bool:
        """Closes the connection that has waited longest for its client; False if none waits."""
        waiting = [connection for connection in self._connections() if connection.gives_way]
        if not waiting:
            return False
        idlest = min(waiting, key=lambda connection: connection.last_seen)
        idlest.transport.abort()
        self.server_state.connections.discard(idlest)  # its socket closes in the loop's next iteration
        return True

    def _connections(self) -> list[ClientConnection]:
        return [known for known in self.server_state.connections if isinstance(known, ClientConnection)]


async def _full(scope: Scope, receive: Receive, send: Send) -> None:
    """ASGI application for connections beyond the limit: answers 503."""
    headers = retry_after(1) | {"Connection": "close"}
    refused = RequestError(503, "All connections of this server are in use", headers=headers)
    await RequestIdMiddleware(error_response(refused, scope["path"]))(scope, receive, send)
