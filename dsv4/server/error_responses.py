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
    """Formats every error of a route, the router or the framework with `error_response`."""

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

    async def on_other(request: Request, error: Exception) -> Response:
        refused = RequestError.from_engine(error)
        if refused is None:
            logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
            refused = RequestError(500, "Internal server error")
        return error_response(refused, request.url.path)

    app.add_exception_handler(RequestError, on_request_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(RequestValidationError, on_wrong_parameter)
    app.add_exception_handler(EngineError, on_other)
    app.add_exception_handler(QueueFullError, on_other)
    app.add_exception_handler(PromptRefusedError, on_other)
    app.add_exception_handler(ClientDisconnect, on_disconnect)
    app.add_exception_handler(Exception, on_other)
