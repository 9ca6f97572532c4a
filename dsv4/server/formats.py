"""The table of wire formats: to serve another API, add its format here."""

from __future__ import annotations

from dsv4.server.chat_completions import CHAT
from dsv4.server.completions import COMPLETIONS
from dsv4.server.messages import MESSAGES
from dsv4.server.responses import RESPONSES
from dsv4.server.wire_format import WireFormat

FORMATS: tuple[WireFormat, ...] = (CHAT, COMPLETIONS, MESSAGES, RESPONSES)


def format_of(path: str) -> WireFormat:
    """The wire format of a path; the first one for an unknown path."""
    return next((known for known in FORMATS if known.matches(path)), FORMATS[0])
