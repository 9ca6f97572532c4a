"""Chat requests over HTTP, streamed: plain sockets, since the client shares the processors that it measures."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from benchmarks.harness.process import BenchmarkError

Json = dict[str, Any]
LINE_BYTES = 1 << 20  # longest event


@dataclass(frozen=True)
class Reply:
    """One answer and its times, in seconds since the request was sent."""

    prompt_tokens: int
    tokens: int  # of the answer
    cached_tokens: int
    text: str
    first_s: float  # of the first text, the last event of an answer without any
    last_s: float

    @property
    def between_s(self) -> float:
        """Mean time between two tokens of the answer."""
        return (self.last_s - self.first_s) / max(1, self.tokens - 1)


def streamed_request(port: int, request: Json) -> bytes:
    """POST /v1/chat/completions with its head, answered as a stream."""
    body = json.dumps({**request, "stream": True}).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def chat(port: int, request: Json) -> Reply:
    """Reply of POST /v1/chat/completions. BenchmarkError unless it is an answer with its usage."""
    sent = perf_counter()
    writer: asyncio.StreamWriter | None = None
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=LINE_BYTES)
        writer.write(streamed_request(port, request))
        status = (await reader.readline()).decode().strip()
        if " 200 " not in f"{status} ":
            raise BenchmarkError(f"refused: {status}: {(await reader.read(2000)).decode(errors='replace')[-600:]}")
        first, times, events = 0.0, [0.0], list[bytes]()
        async for line in _lines(reader):
            if line.startswith(b"data: {"):
                times.append(perf_counter() - sent)
                events.append(line[6:])
                if not first and _text(json.loads(line[6:])):
                    first = times[-1]
        return _reply([json.loads(event) for event in events], first, times[-1])
    except (OSError, asyncio.IncompleteReadError, ValueError) as error:
        raise BenchmarkError(f"no complete answer: {type(error).__name__}: {error}") from error
    finally:
        if writer is not None:
            writer.close()


async def _lines(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Lines of a body in chunks of HTTP/1.1, which may end within a line."""
    while (await reader.readline()).strip():
        pass  # headers
    rest = b""
    while size := int(await reader.readline(), 16):
        *lines, rest = (rest + await reader.readexactly(size)).split(b"\n")
        await reader.readline()
        for line in lines:
            yield line


def _text(event: Json) -> str:
    delta = event["choices"][0].get("delta", {}) if event.get("choices") else {}
    return (delta.get("reasoning_content") or "") + (delta.get("content") or "")


def _reply(events: list[Json], first: float, last: float) -> Reply:
    usage: Json = next((event["usage"] for event in reversed(events) if event.get("usage")), {})
    if not usage:
        raise BenchmarkError(f"an answer without usage: {events[-1:]}")
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    text = "".join(map(_text, events))
    return Reply(usage["prompt_tokens"], usage["completion_tokens"], cached, text, first or last, last)
