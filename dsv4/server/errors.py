"""Errors as DeepSeek's API words them: {"error": {message, type, param, code}}, for every status and path.

Two headers tell the SDKs of OpenAI and Anthropic what to do: `x-should-retry: false` where the same request would fail
again, so that they speak at once; `Retry-After` and `x-should-retry: true` where it will pass.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from typing import Any, cast

import deepseek_recipe as recipe
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from dsv4.engine import EngineError, QueueFullError

logger = logging.getLogger("dsv4.server")

# Status -> (type, code) of the inner object, where they are not those of a bad request.
_KINDS = {
    401: ("authentication_error", "invalid_request_error"),
    403: ("permission_error", "forbidden"),
    404: ("not_found_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    408: ("timeout_error", "request_timeout"),
    413: ("request_too_large", "request_too_large"),
    415: ("invalid_request_error", "unsupported_media_type"),
    500: ("internal_error", "internal_error"),
    503: ("service_unavailable", "service_unavailable"),
}
# Types that Anthropic's clients know by another name.
_MESSAGES_TYPES = {500: "api_error", 503: "overloaded_error"}

# The same request fails again, however often it is sent.
_LASTING = frozenset({400, 401, 403, 404, 405, 413, 415, 422})


class RequestError(Exception):
    """A request is answered with this status and message."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        details: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """`param`: the field at fault; `details`: what a client's program reads, error.details of the body."""
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.details = details
        self.headers = headers

    @classmethod
    def from_recipe(cls, error: recipe.ConversionError | ValueError) -> RequestError:
        """A request that deepseek-recipe refused: its own status and text, or what its parser could not read."""
        if isinstance(error, recipe.ConversionError):
            return cls(error.status_code, str(error))
        detail = str(error).removeprefix("invalid request body: ").removeprefix("invalid JSON request: ")
        return cls(400, f"Failed to deserialize the JSON body into the target type: {detail}")

    @classmethod
    def from_engine(cls, error: BaseException) -> RequestError | None:
        """The refusal that an engine's error stands for, None for an error that nobody foresaw.

        An error with `retry_after` (seconds) passes: the engine is full for now. Any other EngineError lasts.
        """
        if isinstance(error, RequestError):
            return error
        seconds = getattr(error, "retry_after", None)
        if isinstance(seconds, (int, float)):
            return cls(503, str(error), headers=retry_after(seconds))
        if isinstance(error, EngineError):
            return cls(503, str(error), headers={"x-should-retry": "false"})
        return None

    def response(self, path: str) -> Response:
        """The answer to a request for `path`, in the shape and with the headers that its clients read."""
        body = error_body(
            self.status,
            self.message,
            messages_style=is_messages_path(path),
            param=self.param,
            details=self.details,
        )
        headers = dict(self.headers or {})
        if "Retry-After" in headers:
            headers.setdefault("x-should-retry", "true")
        elif self.status in _LASTING:
            headers.setdefault("x-should-retry", "false")
        # Bytes by hand: an error text may quote what the client sent, lone surrogates included.
        return Response(json.dumps(body), self.status, headers, media_type="application/json")


def retry_after(seconds: float) -> dict[str, str]:
    """The header that asks a client to come back: whole seconds, at least 1."""
    return {"Retry-After": str(max(1, math.ceil(seconds)))}


def is_messages_path(path: str) -> bool:
    """True for the Anthropic-style paths, whose errors also carry a top-level type."""
    return path.startswith("/anthropic") or path.rstrip("/").endswith(("/messages", "/count_tokens"))


def error_body(
    status: int,
    message: str,
    *,
    messages_style: bool,
    param: str | None = None,
    details: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """DeepSeek's error object; for Anthropic-style paths a superset that Anthropic's SDK reads too."""
    kind, code = _KINDS.get(status, ("invalid_request_error", "invalid_request_error"))
    if messages_style:
        kind = _MESSAGES_TYPES.get(status, kind)
    inner: dict[str, Any] = {"message": message, "type": kind, "param": param, "code": code}
    if details is not None:
        inner["details"] = dict(details)
    return {"type": "error", "error": inner} if messages_style else {"error": inner}


def install_error_handlers(app: FastAPI) -> None:
    """Every error that leaves a route, the router or the framework gets the shape above."""

    async def on_request_error(request: Request, error: Exception) -> Response:
        return cast(RequestError, error).response(request.url.path)

    async def on_http_error(request: Request, error: Exception) -> Response:
        http = cast(HTTPException, error)
        message = f"{request.method} {request.url.path}: {http.detail}"
        return RequestError(http.status_code, message, headers=http.headers).response(request.url.path)

    async def on_disconnect(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it

    async def on_other(request: Request, error: Exception) -> Response:
        refused = RequestError.from_engine(error)
        if refused is None:
            logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
            refused = RequestError(500, "Internal server error")
        return refused.response(request.url.path)

    app.add_exception_handler(RequestError, on_request_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(EngineError, on_other)
    app.add_exception_handler(QueueFullError, on_other)
    app.add_exception_handler(ClientDisconnect, on_disconnect)
    app.add_exception_handler(Exception, on_other)
