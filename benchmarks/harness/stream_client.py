"""One streamed chat request among hundreds: read as it comes, slowly, or given up; parsed once it has ended."""

from __future__ import annotations

import asyncio
import json
import socket
from dataclasses import dataclass
from typing import Literal

from benchmarks.harness.client import Json, streamed_request

Manner = Literal["prompt", "slow", "vanishing"]
PIECE = 1 << 16
SLOW_PIECE, SLOW_PAUSE = 128, 0.1  # bytes per read of a slow client, seconds between two
SLOW_BUFFER = 4096  # bytes that the kernel takes for a slow client


@dataclass(frozen=True)
class Heard:
    """Answer that a client has received: text and tokens, or why there is none."""

    text: str = ""
    tokens: int = 0
    failure: str | None = None


async def stream(port: int, request: Json, manner: Manner, leave_after: int = 0) -> Heard | None:
    """The answer to POST /v1/chat/completions; None from a client that vanished after `leave_after` bytes."""
    writer: asyncio.StreamWriter | None = None
    received = bytearray()
    try:
        reader, writer = await asyncio.open_connection(sock=_socket(port, manner), limit=SLOW_BUFFER)
        writer.write(streamed_request(port, request))
        while piece := await reader.read(SLOW_PIECE if manner == "slow" else PIECE):
            received += piece
            if manner == "vanishing" and len(received) > leave_after:
                writer.transport.abort()
                return None
            if manner == "slow":
                await asyncio.sleep(SLOW_PAUSE)
        return heard(bytes(received))
    except OSError as error:
        return Heard(failure=f"{type(error).__name__}: {error} after {len(received)} bytes")
    finally:
        if writer is not None:
            writer.close()


def heard(answer: bytes) -> Heard:
    """Reads a whole HTTP answer with chunks. It has failed unless it ends with its usage and [DONE]."""
    head, _, rest = answer.partition(b"\r\n\r\n")
    if b" 200 " not in head.partition(b"\r\n")[0] + b" ":
        return Heard(failure=f"refused: {answer[-400:]!r}")
    body = bytearray()
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        body += rest[:length]
        rest = rest[length + 2 :]
        if not length:
            break
    else:
        return Heard(failure=f"cut off: {answer[-200:]!r}")
    events = [line[6:] for line in bytes(body).split(b"\n") if line.startswith(b"data: ")]
    if not events or events[-1] != b"[DONE]":
        return Heard(failure=f"no end: {answer[-200:]!r}")
    text, tokens = list[str](), 0
    for event in map(json.loads, events[:-1]):
        if "error" in event:
            return Heard(failure=f"{event['error']}")
        for choice in event["choices"]:
            text.append(choice["delta"].get("content") or "")
        tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    return Heard("".join(text), tokens)


def _socket(port: int, manner: Manner) -> socket.socket:
    made = socket.socket()
    if manner == "slow":
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SLOW_BUFFER)
    made.connect(("127.0.0.1", port))
    made.setblocking(False)
    return made
