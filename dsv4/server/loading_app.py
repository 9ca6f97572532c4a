"""LoadingApp: answers 503 until the models are loaded, then everything with the application."""

from __future__ import annotations

from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from dsv4.server.error_responses import error_response
from dsv4.server.errors import RequestError, retry_after
from dsv4.server.request_log import RequestIdMiddleware

RETRY_SECONDS = 5


class LoadingApp:
    """ASGI application of a server that has bound its port and is loading. `app`: set once it is loaded."""

    def __init__(self) -> None:
        self.app: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = self.app if self.app is not None else RequestIdMiddleware(_loading(scope["path"]))
        await answer(scope, receive, send)


def _loading(path: str) -> Response:
    headers = retry_after(RETRY_SECONDS)
    if path.startswith("/health"):
        return JSONResponse({"status": "loading"}, 503, headers)
    return error_response(RequestError(503, "The server is loading its model; try again soon", headers=headers), path)
