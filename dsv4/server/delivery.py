"""Delivery of answers: as server-sent events, or as JSON when complete.

Both stop the generation if the client disconnects, send keep-alives while they wait, so that no proxy takes the
connection for dead, and end with the server. The status line is sent with the first data, so that a request which the
engine refuses gets the status of the refusal, streamed or not.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dsv4.server.drain import Drain
from dsv4.server.error_responses import error_response
from dsv4.server.errors import RequestError
from dsv4.server.service import ChatService, Job

logger = logging.getLogger("dsv4.server")

T = TypeVar("T")


@dataclass(frozen=True)
class Delivery:
    """Settings shared by all answers: the longest silence on a connection, and the server's drain."""

    keep_alive_seconds: float
    drain: Drain

    def answer(self, service: ChatService, job: Job) -> Response:
        """Response for a job: streamed if its request asks for a stream, else whole."""
        return (
            EventStream(service, job, self) if job.request.stream else JsonWhenReady(lambda: service.whole(job), self)
        )


class ClientGoneError(Exception):
    """The client has closed its connection."""


class Answer(Response):
    """A response computed while it is sent: `run` computes, and sends with `emit`."""

    keep_alive: bytes  # sent after each `keep_alive_seconds` of silence
    tells_errors = True  # `fail` reports them to the client

    def __init__(self, delivery: Delivery, headers: dict[str, str] | None = None) -> None:
        super().__init__(headers=headers)
        del self.headers["content-length"]  # not known before the end
        self.delivery = delivery
        self.started = False
        self._sending = asyncio.Lock()  # one part at a time: an answer's, or a keep-alive
        self._sent_at = 0.0

    async def run(self) -> None:
        """Sends the answer. After an error only `fail` sends."""
        raise NotImplementedError

    async def fail(self, error: RequestError) -> None:
        """Reports an error after the status line has been sent."""
        raise NotImplementedError

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._send = send
        try:
            await self._run_while_wanted(receive)
        except ClientGoneError:
            return
        except Exception as error:
            refused = RequestError.from_engine(error)
            if self.started:
                if refused is None:
                    logger.error("%s %r failed", scope["method"], scope["path"], exc_info=error)
                elif refused is not error or not self.tells_errors:  # no trace: hundreds of answers may end at once
                    logger.error("%s %r failed: %s", scope["method"], scope["path"], error)
                await self.fail(refused or RequestError(500, str(error)))
            elif refused is None:
                raise  # UnexpectedErrorMiddleware answers 500 and logs the trace
            else:
                await error_response(refused, scope["path"])(scope, receive, send)

    async def emit(self, body: bytes, *, more: bool = True) -> None:
        """Sends a part of the body, and the status line before the first part."""
        async with self._sending:
            if not self.started:
                self.started = True
                await self._send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await self._send({"type": "http.response.body", "body": body, "more_body": more})
            self._sent_at = asyncio.get_running_loop().time()

    async def _run_while_wanted(self, receive: Receive) -> None:
        """Runs the answer, with keep-alives. Once the client leaves or the server is cut off the answer is cancelled:
        ClientGoneError, or the drain's error.

        Waits once per answer, not once per part.
        """
        async with (
            _task(self.run()) as work,
            _task(_disconnected(receive)) as gone,
            _task(self.delivery.drain.wait_for_cut()) as cut,
            _task(self._keep_alive()),
        ):
            await asyncio.wait({work, gone, cut}, return_when="FIRST_COMPLETED")
            if gone.done():
                raise ClientGoneError
            if not work.done():
                raise self.delivery.drain.cut_error()
            work.result()

    async def _keep_alive(self) -> None:
        """Sends a keep-alive after each `keep_alive_seconds` without a part of the answer."""
        loop, seconds = asyncio.get_running_loop(), self.delivery.keep_alive_seconds
        self._sent_at = loop.time()
        while True:
            left = self._sent_at + seconds - loop.time()
            if left > 0:
                await asyncio.sleep(left)
            elif self._sending.locked():  # a part on its way is no silence, and nothing may follow the last one
                await asyncio.sleep(seconds)
            else:
                await self.emit(self.keep_alive)


class EventStream(Answer):
    """A job's chunks as server-sent events, kept alive by the pings of its format.

    A failure after the first event, a server shutdown included, is sent as an error event of the format.
    """

    media_type = "text/event-stream"

    def __init__(self, service: ChatService, job: Job, delivery: Delivery) -> None:
        super().__init__(delivery, {"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._service, self._job = service, job
        self.keep_alive = job.wire_format.ping()

    async def run(self) -> None:
        async with contextlib.aclosing(self._service.frames(self._job)) as frames:
            async for frame in frames:
                await self.emit(frame.encode())
        await self.emit(self._job.wire_format.last_words(), more=False)

    async def fail(self, error: RequestError) -> None:
        await self.emit(self._job.wire_format.failure(error, self._job.reader).encode(), more=False)


class JsonWhenReady(Answer):
    """Runs `work` and sends its JSON text; blank lines (legal JSON) before it keep the connection alive.

    A failure after the first blank line cuts the connection: an error must not pass for an answer.
    """

    media_type = "application/json"
    keep_alive = b"\n"
    tells_errors = False

    def __init__(self, work: Callable[[], Coroutine[Any, Any, str]], delivery: Delivery) -> None:
        super().__init__(delivery)
        self._work = work

    async def run(self) -> None:
        text = await self._work()
        await self.emit(text.encode(), more=False)

    async def fail(self, error: RequestError) -> None:
        """Sends nothing: the HTTP server closes the connection of an answer that has no end."""


@contextlib.asynccontextmanager
async def _task(work: Coroutine[Any, Any, T]) -> AsyncGenerator[asyncio.Task[T], None]:
    """Context of a task that is cancelled and awaited on exit."""
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    """Returns once the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
