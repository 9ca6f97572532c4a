"""Worker threads for request bodies: few long ones at a time, so that a short one always finds a thread."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

from anyio import CapacityLimiter, to_thread

LONG_BODY_BYTES = 1 << 18  # half a second of tokenization on one core

Result = TypeVar("Result")


class BodyThreads:
    """Runs work on bodies in worker threads: short bodies in the shared pool, long ones under a limit of their own.

    Otherwise forty texts of megabytes would occupy every thread for minutes and take the cores from the model.
    """

    def __init__(self, long_at_once: int | None = None) -> None:
        self._long_at_once = long_at_once or max(1, (os.cpu_count() or 1) // 2)
        self._long: CapacityLimiter | None = None  # belongs to the event loop of the first request

    async def run(self, work: Callable[[bytes], Result], body: bytes) -> Result:
        """Returns work(body), run in a thread; long bodies run in order of arrival."""
        if len(body) < LONG_BODY_BYTES:
            return await to_thread.run_sync(work, body)
        if self._long is None:
            self._long = CapacityLimiter(self._long_at_once)
        return await to_thread.run_sync(work, body, limiter=self._long)
