"""Reads request bodies: JSON only, up to a size limit."""

from __future__ import annotations

from starlette.requests import Request

from dsv4.server.errors import RequestError

MAX_BODY_BYTES = 48 * 1024 * 1024  # the hosted service's limit


async def read_body(request: Request) -> bytes:
    """Read the whole body. RequestError 415 for a type other than JSON, 413 once it is known to be too large."""
    _check_content_type(request.headers.get("content-type", ""))
    body = bytearray()
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > MAX_BODY_BYTES:
        raise _too_large(int(announced))
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise _too_large(len(body))
    return bytes(body)


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
