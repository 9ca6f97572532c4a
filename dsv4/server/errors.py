"""Errors as DeepSeek's API words them: {"error": {message, type, param, code}}, for every status and path."""

from __future__ import annotations

import json
import logging
from typing import Any, cast

import deepseek_recipe as recipe
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from dsv4.engine import EngineError, QueueFullError

logger = logging.getLogger("dsv4.server")

RETRY_AFTER_SECONDS = 5  # said to clients where the queue is full

# Status -> (type, code) of the inner object, where they are not those of a bad request.
_KINDS = {
    401: ("authentication_error", "invalid_request_error"),
    404: ("not_found_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    413: ("request_too_large", "request_too_large"),
    500: ("internal_error", "internal_error"),
    503: ("service_unavailable", "service_unavailable"),
}


class RequestError(Exception):
    """A request is answered with this status and message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message

    @classmethod
    def from_recipe(cls, error: recipe.ConversionError | ValueError) -> RequestError:
        """A request that deepseek-recipe refused: its own status and text, or what its parser could not read."""
        if isinstance(error, recipe.ConversionError):
            return cls(error.status_code, str(error))
        detail = str(error).removeprefix("invalid request body: ").removeprefix("invalid JSON request: ")
        return cls(400, f"Failed to deserialize the JSON body into the target type: {detail}")


def is_messages_path(path: str) -> bool:
    """True for the Anthropic-style paths, whose errors also carry a top-level type."""
    return path.startswith("/anthropic") or path.rstrip("/").endswith(("/messages", "/count_tokens"))


def error_body(status: int, message: str, *, messages_style: bool) -> dict[str, Any]:
    """DeepSeek's error object; for Anthropic-style paths a superset that Anthropic's SDK reads too."""
    kind, code = _KINDS.get(status, ("invalid_request_error", "invalid_request_error"))
    inner = {"message": message, "type": kind, "param": None, "code": code}
    return {"type": "error", "error": inner} if messages_style else {"error": inner}


def error_response(path: str, status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    body = error_body(status, message, messages_style=is_messages_path(path))
    # Bytes by hand: an error text may quote what the client sent, lone surrogates included.
    return Response(json.dumps(body), status, headers, media_type="application/json")


def install_error_handlers(app: FastAPI) -> None:
    """Every error that leaves a route, the router or the framework gets the shape above."""

    async def on_request_error(request: Request, error: Exception) -> Response:
        refused = cast(RequestError, error)
        return error_response(request.url.path, refused.status, refused.message)

    async def on_http_error(request: Request, error: Exception) -> Response:
        http = cast(HTTPException, error)
        message = f"{request.method} {request.url.path}: {http.detail}"
        headers = dict(http.headers) if http.headers is not None else None
        return error_response(request.url.path, http.status_code, message, headers)

    async def on_engine_error(request: Request, error: Exception) -> Response:
        return error_response(request.url.path, 503, str(error))

    async def on_queue_full(request: Request, error: Exception) -> Response:
        return error_response(request.url.path, 503, str(error), {"Retry-After": str(RETRY_AFTER_SECONDS)})

    async def on_disconnect(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it

    async def on_unexpected(request: Request, error: Exception) -> Response:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return error_response(request.url.path, 500, "Internal server error")

    app.add_exception_handler(RequestError, on_request_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(EngineError, on_engine_error)
    app.add_exception_handler(QueueFullError, on_queue_full)
    app.add_exception_handler(ClientDisconnect, on_disconnect)
    app.add_exception_handler(Exception, on_unexpected)
