"""Errors as DeepSeek's API words them: {message, type, param, code}, for every status.

Two headers tell the SDKs of OpenAI and Anthropic what to do: `x-should-retry: false` where the same request would fail
again, so that they speak at once; `Retry-After` and `x-should-retry: true` where it will pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import deepseek_recipe as recipe

from dsv4.engine import EngineError

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

    def as_object(self) -> dict[str, Any]:
        """The error object of a body."""
        kind, code = _KINDS.get(self.status, ("invalid_request_error", "invalid_request_error"))
        found: dict[str, Any] = {"message": self.message, "type": kind, "param": self.param, "code": code}
        if self.details is not None:
            found["details"] = dict(self.details)
        return found

    def response_headers(self) -> dict[str, str]:
        """The headers of the response, with what tells the SDKs whether to send the request again."""
        headers = dict(self.headers or {})
        if "Retry-After" in headers:
            headers.setdefault("x-should-retry", "true")
        elif self.status in _LASTING:
            headers.setdefault("x-should-retry", "false")
        return headers


def retry_after(seconds: float) -> dict[str, str]:
    """The header that asks a client to come back: whole seconds, at least 1."""
    return {"Retry-After": str(max(1, math.ceil(seconds)))}
