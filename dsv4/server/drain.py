"""The end of a server: open answers get a time of grace, new requests are sent away, then what is open is cut off."""

from __future__ import annotations

import asyncio
import time

from starlette.types import ASGIApp, Receive, Scope, Send

from dsv4.server.error_responses import error_response
from dsv4.server.errors import RequestError, retry_after


class Drain:
    """Whether a server is ending, and how far it is. A signal handler may call `begin`; the rest is for one loop."""

    def __init__(self, grace_seconds: float = 7.0) -> None:
        if not 0 <= grace_seconds < float("inf"):
            raise ValueError(f"grace_seconds is {grace_seconds}; allowed: 0 or more")
        self.grace_seconds = grace_seconds
        self._ends: float | None = None
        self._cut = asyncio.Event()

    @property
    def draining(self) -> bool:
        return self._ends is not None

    @property
    def remaining(self) -> float:
        """Seconds of grace that are left."""
        return self.grace_seconds if self._ends is None else max(0.0, self._ends - time.monotonic())

    def begin(self) -> None:
        """Starts the time of grace; a second call changes nothing."""
        if self._ends is None:
            self._ends = time.monotonic() + self.grace_seconds

    def cut(self) -> None:
        """Ends every answer that is still open."""
        self.begin()
        self._cut.set()

    async def wait_for_cut(self) -> None:
        await self._cut.wait()

    def refusal(self) -> RequestError:
        """What a request that comes too late is told."""
        headers = retry_after(self.remaining) | {"Connection": "close"}
        return RequestError(503, "The server is shutting down and takes no new requests", headers=headers)

    def cut_error(self) -> RequestError:
        """What the client of an answer that is cut off is told."""
        return RequestError(
            503, "The server is shutting down: this answer was cut off before its end", headers=retry_after(1)
        )


class DrainMiddleware:
    """Answers 503 to every request but /health, which says so itself, once the server is ending."""

    def __init__(self, app: ASGIApp, drain: Drain) -> None:
        self.app = app
        self.drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self.drain.draining and scope["path"] != "/health":
            await error_response(self.drain.refusal(), scope["path"])(scope, receive, send)
            return
        await self.app(scope, receive, send)
