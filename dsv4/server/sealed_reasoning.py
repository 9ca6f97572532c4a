"""Reasoning as opaque text, `encrypted_content`: clients that keep no reasoning send it back for the next turn.

It is not secret: the text in base64 with the beginning of its SHA-256, so that a damaged one is noticed, and a mark
that tells it from those of other servers.
"""

from __future__ import annotations

import base64
import hashlib
import re

_MARK = "dsv4.1"
_SEALED = re.compile(r"dsv4\.1\.([0-9a-f]{16})\.([A-Za-z0-9_-]*={0,2})")


def seal(text: str) -> str:
    data = text.encode()
    return f"{_MARK}.{_digest(data)}.{base64.urlsafe_b64encode(data).decode()}"


def unseal(sealed: str) -> str | None:
    """The text that was sealed; None for what another server wrote. ValueError for a damaged one."""
    if not sealed.startswith(_MARK + "."):
        return None
    parts = _SEALED.fullmatch(sealed)
    try:
        data = base64.urlsafe_b64decode(parts[2]) if parts else b""
        if parts and _digest(data) == parts[1]:
            return data.decode()
    except ValueError:
        pass
    raise ValueError("it was changed or cut off: its digest does not fit its text")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
