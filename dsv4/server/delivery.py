"""The two ways an answer leaves the server: server-sent events, or JSON when it is ready.

Both stop the generation when the client goes away, send something now and then while they wait, so that no proxy
between takes the connection for dead, and end when the server does. The status line waits for the first thing to send:
a request that the engine refuses gets the status of the refusal, streamed or not.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
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
    """What all answers share: the longest silence on a connection, and the end of the server."""

    keep_alive_seconds: float
    drain: Drain

    def answer(self, service: ChatService, job: Job) -> Response:
        """A job's answer, in the form that its request asked for."""
        return (
            EventStream(service, job, self) if job.request.stream else JsonWhenReady(lambda: service.whole(job), self)
        )


class ClientGoneError(Exception):
    """The client has closed its connection: nobody reads what would be sent."""


class Answer(Response):
    """A response that is computed while it is sent: `run` waits with `wait` and sends with `emit`."""

    keep_alive: bytes  # what is sent after each silence

    def __init__(self, delivery: Delivery, headers: dict[str, str] | None = None) -> None:
        super().__init__(headers=headers)
        del self.headers["content-length"]  # not known before the end
        self.delivery = delivery
        self.started = False

    async def run(self) -> None:
        """Sends the answer. Nothing is sent after an error but what `fail` sends."""
        raise NotImplementedError

    async def fail(self, error: Exception) -> None:
        """Tells of an error when the status line is out."""
        raise NotImplementedError

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._send = send
        async with _task(_disconnected(receive)) as self._gone, _task(self.delivery.drain.wait_for_cut()) as self._cut:
            try:
                await self.run()
            except ClientGoneError:
                return
            except Exception as error:
                refused = RequestError.from_engine(error)
                if self.started:
                    await self.fail(error)
                elif refused is None:
                    raise  # the application answers 500 and logs the trace
                else:
                    await error_response(refused, scope["path"])(scope, receive, send)

    async def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, with keep-alives until it comes.

        Cancels it and raises ClientGoneError when the client leaves, the drain's error when the server cuts it off.
        """
        async with _task(work) as task:
            while True:
                waiting = {task, self._gone, self._cut}
                await asyncio.wait(waiting, timeout=self.delivery.keep_alive_seconds, return_when="FIRST_COMPLETED")
                if self._gone.done():
                    raise ClientGoneError
                if self._cut.done():
                    raise self.delivery.drain.cut_error()
                if task.done():
                    return task.result()
                await self.emit(self.keep_alive)

    async def emit(self, body: bytes, *, more: bool = True) -> None:
        """Sends a part of the body, and the status line before the first."""
        if not self.started:
            self.started = True
            await self._send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await self._send({"type": "http.response.body", "body": body, "more_body": more})


class EventStream(Answer):
    """A job's chunks as events, kept alive by the pings of its format.

    What fails after the first event, the end of the server included, is told in an error event of the format.
    """

    media_type = "text/event-stream"

    def __init__(self, service: ChatService, job: Job, delivery: Delivery) -> None:
        super().__init__(delivery, {"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._service, self._job = service, job
        self.keep_alive = job.wire_format.ping()

    async def run(self) -> None:
        async with contextlib.aclosing(self._service.frames(self._job)) as frames:
            while (frame := await self.wait(_following(frames))) is not None:
                await self.emit(frame.encode())
        await self.emit(self._job.wire_format.last_words(), more=False)

    async def fail(self, error: Exception) -> None:
        wire_format = self._job.wire_format
        if not isinstance(error, RequestError):
            logger.error("%s %s failed", wire_format.name, self._job.id, exc_info=error)
        told = RequestError.from_engine(error) or RequestError(500, str(error))
        await self.emit(wire_format.error_event(told).encode(), more=False)


class JsonWhenReady(Answer):
    """Runs `work` and sends its JSON text; blank lines before it (legal JSON) while it takes long.

    What fails after the first blank line cuts the connection: an error must not pass for an answer.
    """

    media_type = "application/json"
    keep_alive = b"\n"

    def __init__(self, work: Callable[[], Coroutine[Any, Any, str]], delivery: Delivery) -> None:
        super().__init__(delivery)
        self._work = work

    async def run(self) -> None:
        text = await self.wait(self._work())
        await self.emit(text.encode(), more=False)

    async def fail(self, error: Exception) -> None:
        raise error


async def _following(frames: AsyncIterator[T]) -> T | None:
    """The next frame, None after the last."""
    return await anext(frames, None)


@contextlib.asynccontextmanager
async def _task(work: Coroutine[Any, Any, T]) -> AsyncGenerator[asyncio.Task[T], None]:
    """A task that is cancelled, and over, when the block is left."""
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    """Returns when the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
