"""Messages between a sandbox and its owner: JSON header and raw body over a pair of file descriptors."""

import json
import os
import struct
from typing import Any

LENGTHS = struct.Struct("<II")
LARGEST = 1 << 31


def send(descriptor: int, header: dict[str, Any], body: bytes = b"") -> None:
    text = json.dumps(header).encode()
    data = memoryview(LENGTHS.pack(len(text), len(body)) + text + body)
    while data:
        data = data[os.write(descriptor, data) :]


def receive(descriptor: int) -> tuple[dict[str, Any], bytes] | None:
    """Next message; None at the end of the stream. ValueError for a message above LARGEST."""
    lengths = _exactly(descriptor, LENGTHS.size)
    if lengths is None:
        return None
    header, body = LENGTHS.unpack(lengths)
    if header + body > LARGEST:
        raise ValueError(f"message of {header + body} bytes; at most {LARGEST}")
    data = _exactly(descriptor, header + body)
    return None if data is None else (json.loads(data[:header]), data[header:])


def _exactly(descriptor: int, count: int) -> bytes | None:
    parts: list[bytes] = []
    while count:
        part = os.read(descriptor, min(count, 1 << 20))
        if not part:
            return None
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
