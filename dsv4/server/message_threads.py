"""Message threads: conversations that Anthropic's service stores between requests. This server has none."""

from __future__ import annotations

from typing import Any

from dsv4.server.errors import RequestError

# Anthropic's SDKs recognize this and send the whole conversation instead.
UNSUPPORTED = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}


def refuse_threads(request: dict[str, Any]) -> None:
    """RequestError 400 for a Messages request that opens or continues a thread."""
    if request.get("thread") is not None:
        raise RequestError(
            400,
            "thread: this server holds no conversations; send the whole conversation without `thread`",
            param="thread",
            details=UNSUPPORTED,
        )
