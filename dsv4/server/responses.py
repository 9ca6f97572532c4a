"""The two ways an answer leaves the server: server-sent events, or JSON when it is ready.

Both stop the generation when the client goes away, and both send something now and then while they wait, so that no
proxy between takes the connection for dead.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dsv4.engine import EngineError
from dsv4.server.errors import error_body, error_response
from dsv4.server.service import MESSAGES, ChatService, Job

logger = logging.getLogger("dsv4.server")


def event_stream(service: ChatService, job: Job, keep_alive_seconds: float) -> Response:
    """Streams a job's chunks; comments keep a Chat Completions stream alive, ping events a Messages stream."""
    messages_style = job.protocol is MESSAGES

    def ping() -> ServerSentEvent:
        if messages_style:
            return ServerSentEvent('{"type": "ping"}', event="ping", sep="\n")
        return ServerSentEvent(comment="keep-alive", sep="\n")

    return EventSourceResponse(
        _frames(service, job, messages_style), ping=keep_alive_seconds, ping_message_factory=ping, sep="\n"
    )


async def _frames(service: ChatService, job: Job, messages_style: bool) -> AsyncGenerator[ServerSentEvent, None]:
    response = job.protocol.response
    try:
        async with contextlib.aclosing(service.chunks(job)) as chunks:
            async for chunk in chunks:
                name = response.sse_event_name(chunk)  # pyright: ignore[reportArgumentType]  # of the same protocol
                yield ServerSentEvent(chunk.to_json(), event=name, sep="\n")
    except Exception as error:  # the status line is out: whatever failed, the client learns of it in the stream
        logger.error("%s %s failed", job.protocol.name, job.id, exc_info=error)
        status = 503 if isinstance(error, EngineError) else 500
        body = json.dumps(error_body(status, str(error), messages_style=messages_style))
        yield ServerSentEvent(body, event="error" if messages_style else None, sep="\n")
        return
    done = response.sse_done_data()
    if done is not None:
        yield ServerSentEvent(done, sep="\n")


class JsonWhenReady(Response):
    """Runs `work` and sends its JSON text; blank lines before it (legal JSON) while it takes long.

    `work` is cancelled when the client goes away. As long as nothing has been sent, an error of the engine is a 503 and
    any other leaves for the application's handlers.
    """

    media_type = "application/json"

    def __init__(self, work: Callable[[], Coroutine[Any, Any, str]], keep_alive_seconds: float) -> None:
        super().__init__()
        self._work = work
        self._keep_alive_seconds = keep_alive_seconds
        del self.headers["content-length"]  # not known before the work is done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.create_task(self._work())
        gone = asyncio.create_task(_disconnected(receive))
        started = False
        try:
            while True:
                await asyncio.wait({work, gone}, timeout=self._keep_alive_seconds, return_when=asyncio.FIRST_COMPLETED)
                if gone.done():
                    return
                if work.done() and not started and (error := work.exception()) is not None:
                    if not isinstance(error, EngineError):
                        raise error
                    await error_response(scope["path"], 503, str(error))(scope, receive, send)
                    return
                if not started:
                    started = True
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                if work.done():
                    await send({"type": "http.response.body", "body": work.result().encode(), "more_body": False})
                    return
                await send({"type": "http.response.body", "body": b"\n", "more_body": True})
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    """Returns when the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
