"""Error responses: every refusal has the format of the requested path."""

from __future__ import annotations

import json
import logging
from typing import cast

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dsv4.engine import EngineError, QueueFullError
from dsv4.engine.errors import PromptRefusedError
from dsv4.server.errors import RequestError
from dsv4.server.formats import format_of

logger = logging.getLogger("dsv4.server")


def error_response(error: RequestError, path: str) -> Response:
    """Error response for a request to `path`, in the shape and with the headers of that path's format."""
    # json.dumps escapes non-ASCII: the message may quote the client's text, lone surrogates included.
    body = json.dumps(format_of(path).error_body(error))
    return Response(body, error.status, error.response_headers(), media_type="application/json")


def install_error_handlers(app: FastAPI) -> None:
    """Formats the errors that routes, the router and the framework raise on purpose with `error_response`."""

    async def on_request_error(request: Request, error: Exception) -> Response:
        return error_response(cast(RequestError, error), request.url.path)

    async def on_http_error(request: Request, error: Exception) -> Response:
        http = cast(HTTPException, error)
        message = f"{request.method} {request.url.path}: {http.detail}"
        if http.status_code == 405 and http.headers:
            message += f"; send {http.headers['Allow']}"
        return error_response(RequestError(http.status_code, message, headers=http.headers), request.url.path)

    async def on_wrong_parameter(request: Request, error: Exception) -> Response:
        fault = cast(RequestValidationError, error).errors()[0]
        name = str(fault["loc"][-1])
        return error_response(RequestError(400, f"{name}: {fault['msg']}", param=name), request.url.path)

    async def on_disconnect(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # the client is gone

    async def on_engine_error(request: Request, error: Exception) -> Response:
        refused = RequestError.from_engine(error)
        assert refused is not None, "the handler of what the engine raises"
        return error_response(refused, request.url.path)

    app.add_exception_handler(RequestError, on_request_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(RequestValidationError, on_wrong_parameter)
    for kind in (EngineError, QueueFullError, PromptRefusedError):
        app.add_exception_handler(kind, on_engine_error)
    app.add_exception_handler(ClientDisconnect, on_disconnect)


class UnexpectedErrorMiddleware:
    """Answers 500 for any other exception, and logs its trace.

    A handler for Exception would run outside of all middleware: its answer had neither a request id nor the headers
    that let a page of another origin read it. An answer that has begun is left to the HTTP server, which cuts it off.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def send_and_note(message: Message) -> None:
            nonlocal begun
            begun = begun or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, send_and_note)
        except Exception as error:
            if scope["type"] != "http" or begun:
                raise
            logger.error("%s %r failed", scope["method"], scope["path"], exc_info=error)
            await error_response(RequestError(500, "Internal server error"), scope["path"])(scope, receive, send)
