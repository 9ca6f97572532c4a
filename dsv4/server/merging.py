"""merged: several asynchronous streams as one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class _End:
    """End of one stream, by an error if there is one."""

    error: BaseException | None = None


async def merged(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """Yields the items of all streams as they come; raises the first error. Closing it closes all of them."""
    items: asyncio.Queue[T | _End] = asyncio.Queue()

    async def drain(stream: AsyncGenerator[T, None]) -> None:
        end = _End()
        try:
            async with contextlib.aclosing(stream) as open_stream:
                async for item in open_stream:
                    items.put_nowait(item)
        except Exception as error:
            end = _End(error)
        items.put_nowait(end)

    tasks = [asyncio.create_task(drain(stream)) for stream in streams]
    try:
        left = len(tasks)
        while left:
            item = await items.get()
            if not isinstance(item, _End):
                yield item
            elif item.error is not None:
                raise item.error
            else:
                left -= 1
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
