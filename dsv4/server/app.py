"""create_app: every route of the server over one engine."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI
from starlette.responses import Response

from dsv4.engine import AsyncEngine
from dsv4.server.auth import ApiKeyMiddleware
from dsv4.server.chat_completions import chat_router
from dsv4.server.errors import install_error_handlers
from dsv4.server.messages import messages_router
from dsv4.server.models import models_router
from dsv4.server.service import OFFICIAL_NAMES, ChatService
from dsv4.server.web import chat_routes

KEEP_ALIVE_SECONDS = 10.0


def create_app(
    engine: AsyncEngine,
    *,
    model_name: str | None = None,
    aliases: Sequence[str] = OFFICIAL_NAMES,
    api_keys: Sequence[str] = (),
    thinking: bool = True,
    keep_alive_seconds: float = KEEP_ALIVE_SECONDS,
) -> FastAPI:
    """The server's ASGI application.

    `model_name` is what the model is called (default: the engine's own name), `aliases` are further names that it
    answers to. With `api_keys` every path but the page and /health needs one. `thinking`: the default of requests that
    do not say. The engine stays the caller's to close. No documentation routes: their pages load code from elsewhere.
    """
    if not all(api_keys):
        raise ValueError("an API key is an empty string; give keys of at least 1 character, or no key at all")
    app = FastAPI(title="dsv4", docs_url=None, redoc_url=None, openapi_url=None)
    service = ChatService(engine, model_name or engine.llm.name, aliases, thinking)
    install_error_handlers(app)
    if api_keys:
        app.add_middleware(ApiKeyMiddleware, api_keys=list(api_keys))
    app.include_router(chat_router(service, keep_alive_seconds))
    app.include_router(messages_router(service, keep_alive_seconds))
    app.include_router(models_router(service))

    @app.api_route("/anthropic", methods=["GET", "HEAD"])
    async def anthropic_base() -> Response:  # pyright: ignore[reportUnusedFunction]
        """Some clients probe their base address before they use it."""
        return Response(status_code=200)

    app.router.routes.extend(chat_routes())
    return app
