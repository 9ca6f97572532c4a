"""UsageRecord: one request's usage, as the ledger keeps it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from datetime import UTC, datetime

from dsv4.usage.prices import Tokens

MAX_TEXT = 512  # characters of a client's text, such as a user id, that are kept


@dataclass(frozen=True)
class UsageRecord:
    """Usage of one request. Tokens are 0 if it ended before its first token."""

    time: str  # of its arrival: UTC, ISO 8601 with milliseconds
    request_id: str
    wire_format: str
    model: str  # the client's name for it
    api_key: str  # masked, "" without one
    user_id: str  # the client's id of its user, "" without one
    prompt_tokens: int
    cache_hit_tokens: int
    cache_miss_tokens: int
    completion_tokens: int  # reasoning included
    reasoning_tokens: int
    finish_reason: str  # stop, length, cancelled or error
    seconds: float  # from its arrival to its end
    cost_usd: float | None  # by DeepSeek's prices of that time; None for a model without a price

    @property
    def tokens(self) -> Tokens:
        return Tokens(self.cache_hit_tokens, self.cache_miss_tokens, self.completion_tokens, self.reasoning_tokens)


COLUMNS = tuple(field.name for field in fields(UsageRecord))


def time_text(when: datetime) -> str:
    """Time as records have it; these texts sort by time."""
    return when.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.") + f"{when.microsecond // 1000:03d}Z"


def masked(key: str | None) -> str:
    """Name of an API key in the ledger: its last 4 characters if it is long enough to hide the rest, and a short hash.

    The hash has 32 bits: it tells keys apart and is too short to find a key from.
    """
    if not key:
        return ""
    shown = key[-4:] if len(key) >= 16 else ""
    return f"****{shown}#{hashlib.sha256(key.encode('utf-8', 'replace')).hexdigest()[:8]}"


def plain(text: str | None) -> str:
    """A client's text as every database takes it: no NUL, no lone surrogates, not too long."""
    return (text or "").replace("\0", "").encode("utf-8", "replace").decode()[:MAX_TEXT]
