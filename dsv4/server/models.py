"""GET /models and /models/{id}: one shape that OpenAI's and Anthropic's SDKs both read; GET /health."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse

from dsv4.server.drain import Drain
from dsv4.server.errors import RequestError
from dsv4.server.service import ChatService

MAX_OUTPUT_TOKENS = 393216


def models_router(service: ChatService, drain: Drain) -> APIRouter:
    router = APIRouter()
    created = int(time.time())
    context = service.conversation.max_model_len

    def describe(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "type": "model",
            "owned_by": "dsv4",
            "root": service.model_name,
            "name": name,
            "display_name": name,
            "created": created,
            "created_at": datetime.fromtimestamp(created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "context_window": context,
            "max_output_tokens": min(MAX_OUTPUT_TOKENS, context),
            "input_modalities": ["text"],
            "output_modalities": ["text"],
            "effort": {"supported_levels": ["low", "high", "max"], "default_level": "high"},
        }

    @router.get("/models")
    @router.get("/v1/models")
    @router.get("/beta/models")
    @router.get("/beta/v1/models")
    @router.get("/anthropic/v1/models")
    async def list_models() -> dict[str, Any]:  # pyright: ignore[reportUnusedFunction]
        """The served model first, then the other names that it answers to."""
        names = service.model_names
        return {
            "object": "list",
            "data": [describe(name) for name in names],
            "has_more": False,
            "first_id": names[0],
            "last_id": names[-1],
        }

    @router.get("/models/{name}")
    @router.get("/v1/models/{name}")
    @router.get("/beta/models/{name}")
    @router.get("/beta/v1/models/{name}")
    @router.get("/anthropic/v1/models/{name}")
    async def get_model(name: str) -> dict[str, Any]:  # pyright: ignore[reportUnusedFunction]
        if name not in service.model_names:
            raise RequestError(404, f"There is no model {name!r}; the models are {', '.join(service.model_names)}.")
        return describe(name)

    @router.get("/health")
    async def health() -> JSONResponse:  # pyright: ignore[reportUnusedFunction]
        """200 while requests are taken, 503 once the engine has failed (with the reason) or the server is ending."""
        engine = service.engine
        state: dict[str, Any] = {"status": "ok", "running": engine.num_running, "waiting": engine.num_waiting}
        if not engine.healthy:
            state["status"], state["error"] = "error", str(engine.error or "the engine is closed")
        elif drain.draining:
            state["status"] = "draining"
        return JSONResponse(state, 200 if state["status"] == "ok" else 503)

    return router
