"""Server-sent events, encoded to bytes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Event:
    """One event of a stream: its data, which has no line breaks, and its name if the format names events."""

    data: str
    name: str | None = None

    def encode(self) -> bytes:
        assert "\n" not in self.data and "\r" not in self.data, "data of one line"
        if self.name is None:
            return f"data: {self.data}\n\n".encode()
        return f"event: {self.name}\ndata: {self.data}\n\n".encode()


def comment(text: str) -> bytes:
    """Encode a comment line, which clients skip."""
    return f": {text}\n\n".encode()
