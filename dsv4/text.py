"""Text that UTF-8 can encode. Python strings can also hold half a surrogate pair, or a byte that was not UTF-8."""

from __future__ import annotations

from io import TextIOWrapper
from typing import TextIO


def check_text(text: str, name: str = "the text") -> None:
    """ValueError if UTF-8 cannot encode `text`; the message begins with `name` and names the character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        # From a terminal, a file name or an argument, Python keeps a byte that is not UTF-8 as U+DC80 to U+DCFF.
        what = f"byte 0x{code - 0xDC00:02X}, which is not UTF-8" if 0xDC80 <= code <= 0xDCFF else _half(code)
        raise ValueError(f"{name}: character {error.start} is {what}; allowed: whole Unicode characters") from error


def keep_foreign_bytes(stream: TextIO) -> None:
    """Let a stream decode bytes that are not UTF-8 to characters that check_text reports, instead of failing."""
    if isinstance(stream, TextIOWrapper):
        stream.reconfigure(errors="surrogateescape")


def _half(code: int) -> str:
    return f"U+{code:04X}, half of a surrogate pair"
