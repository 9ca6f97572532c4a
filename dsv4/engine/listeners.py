"""Destinations of a request's events."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Protocol, Self

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
    """Queue of a client's event loop `loop`; in that loop, an iterator over the events up to the last one."""

    queue: asyncio.Queue[Item]
    loop: asyncio.AbstractEventLoop
    finished: bool = field(default=False, init=False)  # the last event has been read

    def send(self, item: Item) -> None:
        self.loop.call_soon_threadsafe(self.queue.put_nowait, item)  # RuntimeError: the loop is closed

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TokenEvent | ProgressEvent:
        """The next event; raises the error that ends the request."""
        if self.finished:
            raise StopAsyncIteration
        item = await self.queue.get()
        self.finished = is_last(item)
        if isinstance(item, EngineError):
            raise item
        return item


def is_last(item: Item) -> bool:
    """True if a request has no event after this one."""
    return isinstance(item, EngineError) or (isinstance(item, TokenEvent) and item.finish_reason is not None)
