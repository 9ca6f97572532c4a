"""Order of the parts of an answer on the wire."""

from __future__ import annotations

import asyncio
from typing import Any

from dsv4.server.delivery import Delivery, JsonWhenReady
from dsv4.server.drain import Drain


def test_nothing_follows_the_last_part_to_a_slow_reader() -> None:
    """A part that is on its way for longer than `keep_alive_seconds` is no silence."""
    sent: list[dict[str, Any]] = []

    async def work() -> str:
        await asyncio.sleep(0.05)
        return "{}"

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        if message.get("body") == b"{}":
            await asyncio.sleep(0.3)
        sent.append(message)

    async def answer() -> None:
        scope = {"type": "http", "path": "/v1/chat/completions", "method": "POST", "headers": []}
        await JsonWhenReady(work, Delivery(0.02, Drain()))(scope, receive, send)

    asyncio.run(answer())
    bodies = [message for message in sent if message["type"] == "http.response.body"]
    assert bodies[0]["body"] == b"\n", "blank lines keep the connection alive while the answer is computed"
    assert [body["more_body"] for body in bodies] == [True] * (len(bodies) - 1) + [False]
