"""Text that UTF-8 can hold. Python strings can also hold half a surrogate pair, or a byte that was no UTF-8."""

from __future__ import annotations

from io import TextIOWrapper
from typing import TextIO


def check_text(text: str, name: str = "the text") -> None:
    """ValueError that begins with `name` and says which character of a text has no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        # Where Python reads a terminal, a file name or an argument, it keeps a foreign byte as U+DC80 to U+DCFF.
        what = f"byte 0x{code - 0xDC00:02X}, which is not UTF-8" if 0xDC80 <= code <= 0xDCFF else _half(code)
        raise ValueError(f"{name}: character {error.start} is {what}; allowed: whole Unicode characters") from error


def keep_foreign_bytes(stream: TextIO) -> None:
    """Let a stream give bytes that are not UTF-8 as characters that check_text names, in the place of an error."""
    if isinstance(stream, TextIOWrapper):
        stream.reconfigure(errors="surrogateescape")


def _half(code: int) -> str:
    return f"U+{code:04X}, half of a surrogate pair"
