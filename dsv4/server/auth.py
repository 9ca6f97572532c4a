"""API keys: Authorization: Bearer KEY or x-api-key: KEY, on every path except a few open ones."""

from __future__ import annotations

import hmac
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from dsv4.server.error_responses import error_response
from dsv4.server.errors import RequestError
from dsv4.server.users import remember_key

# The page itself holds no secrets, and each of its API calls needs the key.
OPEN_PATHS = ("/", "/health", "/health/deep", "/favicon.ico")
OPEN_PREFIXES = ("/web/",)


class ApiKeyMiddleware:
    """Answers 401 unless a request has one of the keys. Unknown paths need one too: nothing is open by accident."""

    def __init__(self, app: ASGIApp, api_keys: Iterable[str]) -> None:
        self.app = app
        self.api_keys = [key.encode() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self.api_keys or _is_open(scope["path"]):
            await self.app(scope, receive, send)
            return
        key = presented_key(Headers(scope=scope))
        if key is not None and self._is_valid(key):
            remember_key(scope, key)
            await self.app(scope, receive, send)
            return
        message = (
            f"Authentication Fails, Your api key: ****{key[-4:]} is invalid"
            if key
            else "Authentication Fails, no api key was given: send Authorization: Bearer KEY or x-api-key: KEY"
        )
        refused = RequestError(401, message, headers={"WWW-Authenticate": "Bearer"})
        await error_response(refused, scope["path"])(scope, receive, send)

    def _is_valid(self, key: str) -> bool:
        """Compares with every key in constant time, so that timing reveals neither a match nor its position."""
        given = key.encode("latin-1")  # headers are decoded as Latin-1: back to the received bytes
        return sum(hmac.compare_digest(given, known) for known in self.api_keys) > 0


def presented_key(headers: Headers) -> str | None:
    """API key of a request, None without one. Authorization takes precedence over x-api-key."""
    authorization = headers.get("authorization")
    if authorization is not None:
        scheme, _, key = authorization.partition(" ")
        return key.strip() if scheme.lower() == "bearer" else ""
    return headers.get("x-api-key")


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(OPEN_PREFIXES)
