"""Errors in the shape of DeepSeek's API: {message, type, param, code}, for every status.

Two headers steer the retries of OpenAI's and Anthropic's SDKs: `x-should-retry: false` if the same request would fail
again, so that they report it at once; `Retry-After` and `x-should-retry: true` if a later try may succeed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import deepseek_recipe as recipe

from dsv4.engine import EngineError
from dsv4.engine.errors import PromptRefusedError

# Status -> (type, code) of the inner object; any other status has those of a bad request.
_KINDS = {
    401: ("authentication_error", "invalid_request_error"),
    403: ("permission_error", "forbidden"),
    404: ("not_found_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    408: ("timeout_error", "request_timeout"),
    413: ("request_too_large", "request_too_large"),
    415: ("invalid_request_error", "unsupported_media_type"),
    429: ("rate_limit_error", "rate_limit_reached"),
    431: ("request_too_large", "request_header_fields_too_large"),
    500: ("internal_error", "internal_error"),
    501: ("internal_error", "not_implemented"),
    503: ("service_unavailable", "service_unavailable"),
}

# Statuses of requests that fail again however often they are sent.
_LASTING = frozenset({400, 401, 403, 404, 405, 413, 415, 422, 431, 501})


class RequestError(Exception):
    """Error that a request is answered with: status, message, headers."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        details: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """`param`: the field at fault; `details`: machine-readable, error.details in the body."""
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.details = details
        self.headers = headers

    @classmethod
    def from_recipe(cls, error: recipe.ConversionError | ValueError) -> RequestError:
        """Error for a request that deepseek-recipe refused: its status and text, or 400 with its parser's message."""
        if isinstance(error, recipe.ConversionError):
            return cls(error.status_code, str(error))
        detail = str(error).removeprefix("invalid request body: ").removeprefix("invalid JSON request: ")
        return cls(400, f"Failed to deserialize the JSON body into the target type: {detail}")

    @classmethod
    def from_engine(cls, error: BaseException) -> RequestError | None:
        """Error response for an engine's error; None for an unexpected exception.

        An error with `retry_after` (seconds) is temporary: the engine is full. Any other EngineError is permanent. A
        prompt that has crashed the engine is the request's fault, so that no balancer sends it to another server.
        """
        if isinstance(error, RequestError):
            return error
        if isinstance(error, PromptRefusedError):
            return cls(400, str(error))
        seconds = getattr(error, "retry_after", None)
        if isinstance(seconds, (int, float)):
            return cls(503, str(error), headers=retry_after(seconds))
        if isinstance(error, EngineError):
            return cls(503, str(error), headers={"x-should-retry": "false"})
        return None

    def as_object(self) -> dict[str, Any]:
        """The error object in a response body."""
        kind, code = _KINDS.get(self.status, ("invalid_request_error", "invalid_request_error"))
        found: dict[str, Any] = {"message": self.message, "type": kind, "param": self.param, "code": code}
        if self.details is not None:
            found["details"] = dict(self.details)
        return found

    def response_headers(self) -> dict[str, str]:
        """Response headers, with the hint to SDKs to retry or not."""
        headers = dict(self.headers or {})
        if "Retry-After" in headers:
            headers.setdefault("x-should-retry", "true")
        elif self.status in _LASTING:
            headers.setdefault("x-should-retry", "false")
        return headers


def retry_after(seconds: float) -> dict[str, str]:
    """Retry-After header: whole seconds, rounded up, at least 1."""
    return {"Retry-After": str(max(1, math.ceil(seconds)))}
