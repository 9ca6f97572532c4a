"""Reading request bodies within a limit."""

from __future__ import annotations

from starlette.requests import Request

from dsv4.server.errors import RequestError

MAX_BODY_BYTES = 48 * 1024 * 1024  # the hosted service's limit


async def read_body(request: Request) -> bytes:
    """The whole body; RequestError 413 as soon as it is known to be too large."""
    body = bytearray()
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > MAX_BODY_BYTES:
        raise _too_large(int(announced))
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise _too_large(len(body))
    return bytes(body)


def _too_large(size: int) -> RequestError:
    return RequestError(413, f"The request body has {size} bytes or more; the limit is {MAX_BODY_BYTES} bytes")
