"""Reads request bodies: JSON only, up to a limit for each and one for all together."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator

from starlette.requests import Request

from dsv4.server.errors import RequestError, retry_after

MAX_BODY_BYTES = 48 * 1024 * 1024  # the hosted service's limit
MAX_BODIES_BYTES = 1 << 30  # of the requests that arrive, or wait for a thread
_FULL_SECONDS = 1.0  # after which a refused request may be sent again


class Bodies:
    """Bodies of open requests, until they are rendered. Belongs to one event loop."""

    def __init__(self, max_bytes: int = MAX_BODIES_BYTES) -> None:
        self._max_bytes = self._left = max_bytes

    @contextlib.asynccontextmanager
    async def read(self, request: Request) -> AsyncGenerator[bytes, None]:
        """Context of a whole body. RequestError 415 for a type other than JSON, 413 once it is known to be too large,
        503 if the bodies of other requests leave no room for it.
        """
        _check_content_type(request.headers.get("content-type", ""))
        announced = request.headers.get("content-length", "")
        if announced.isdigit() and int(announced) > MAX_BODY_BYTES:
            raise _too_large(int(announced))
        received, held = bytearray(), 0  # one buffer: many small parts would take more than their bytes
        try:
            async for chunk in request.stream():
                if len(chunk) > self._left:
                    message = f"Open requests hold {self._max_bytes - self._left} bytes, of {self._max_bytes} at most"
                    raise RequestError(503, message, headers=retry_after(_FULL_SECONDS))
                received += chunk
                held += len(chunk)
                self._left -= len(chunk)
                if held > MAX_BODY_BYTES:
                    raise _too_large(held)
            body = bytes(received)
            received.clear()  # the body is held once from here on
            yield body
        finally:
            self._left += held


def _check_content_type(value: str) -> None:
    """RequestError 415 unless the content type is JSON or missing.

    A page of another origin can send text and forms without a CORS preflight, but not JSON. Some libraries send a
    string without a type; among such requests those from pages are recognized by their Origin.
    """
    kind = value.partition(";")[0].strip().lower()
    if not kind or kind == "application/json" or kind.endswith("+json"):
        return
    message = f"Content-Type is {kind!r}; allowed: application/json. Send the header Content-Type: application/json"
    if kind == "application/x-www-form-urlencoded":  # the default of curl -d
        message += " (curl: add -H 'Content-Type: application/json', or use --json instead of -d)"
    raise RequestError(415, message)


def _too_large(size: int) -> RequestError:
    return RequestError(413, f"The request body has {size} bytes or more; the limit is {MAX_BODY_BYTES} bytes")
