"""Destinations of a request's events."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Protocol

from dsv4.engine.errors import EngineError
from dsv4.engine.outputs import ProgressEvent, TokenEvent

Item = TokenEvent | ProgressEvent | EngineError


class Listener(Protocol):
    """Destination of a request's events."""

    def send(self, item: Item, /) -> None:
        """Takes an event, in the engine thread. RuntimeError where nobody reads it: the request is stopped."""
        ...


@dataclass(eq=False)  # one client: a key of sets and dicts
class QueueListener:
    """Queue of a client's event loop `loop`."""

    queue: asyncio.Queue[Item]
    loop: asyncio.AbstractEventLoop

    def send(self, item: Item) -> None:
        self.loop.call_soon_threadsafe(self.queue.put_nowait, item)  # RuntimeError: the loop is closed
