"""Graceful shutdown: new requests are refused, open answers get a grace period, then they are cut off."""

from __future__ import annotations

import asyncio
import time

from starlette.types import ASGIApp, Receive, Scope, Send

from dsv4.server.error_responses import error_response
from dsv4.server.errors import RequestError, retry_after

WATCHING = ("/health", "/health/deep", "/metrics")  # paths that are answered during the shutdown too


class Drain:
    """State of the shutdown. A signal handler may call `begin`; all else belongs to one event loop."""

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
        """Seconds left of the grace period."""
        return self.grace_seconds if self._ends is None else max(0.0, self._ends - time.monotonic())

    def begin(self) -> None:
        """Starts the grace period; a second call changes nothing."""
        if self._ends is None:
            self._ends = time.monotonic() + self.grace_seconds

    def cut(self) -> None:
        """Ends every open answer."""
        self.begin()
        self._cut.set()

    async def wait_for_cut(self) -> None:
        await self._cut.wait()

    def refusal(self) -> RequestError:
        """Error for a new request during the shutdown."""
        headers = retry_after(self.remaining) | {"Connection": "close"}
        return RequestError(503, "The server is shutting down and takes no new requests", headers=headers)

    def cut_error(self) -> RequestError:
        """Error for an answer that is cut off."""
        return RequestError(
            503, "The server is shutting down: this answer was cut off before its end", headers=retry_after(1)
        )


class DrainMiddleware:
    """Answers 503 to every request during the shutdown, except those that watch it: /health and /metrics."""

    def __init__(self, app: ASGIApp, drain: Drain) -> None:
        self.app = app
        self.drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self.drain.draining and scope["path"] not in WATCHING:
            await error_response(self.drain.refusal(), scope["path"])(scope, receive, send)
            return
        await self.app(scope, receive, send)
