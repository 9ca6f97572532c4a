"""Server-sent events, encoded to bytes."""

from __future__ import annotations

from dataclasses import dataclass

from sse_starlette import ServerSentEvent


@dataclass(frozen=True)
class Event:
    """One event of a stream: its data on one line, and its name if the format names events."""

    data: str
    name: str | None = None

    def encode(self) -> bytes:
        return ServerSentEvent(self.data, event=self.name, sep="\n").encode()


def comment(text: str) -> bytes:
    """Encode a comment line, which clients skip."""
    return ServerSentEvent(comment=text, sep="\n").encode()
