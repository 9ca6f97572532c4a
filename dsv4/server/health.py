"""Probes of load balancers and clients: GET /health, and the base URL of Anthropic's API."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from dsv4.engine.interface import Engine
from dsv4.engine.process.client import EngineCrashedError
from dsv4.server.drain import Drain


def health_router(engine: Engine, drain: Drain) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    async def health() -> JSONResponse:  # pyright: ignore[reportUnusedFunction]
        """200 while requests are accepted; 503 if the engine has failed or is being started again (with the reason), or
        the server is draining."""
        state: dict[str, Any] = {"status": "ok", "running": engine.num_running, "waiting": engine.num_waiting}
        if not engine.healthy:
            state["status"] = "restarting" if isinstance(engine.error, EngineCrashedError) else "error"
            state["error"] = str(engine.error or "the engine is closed")
        elif drain.draining:
            state["status"] = "draining"
        return JSONResponse(state, 200 if state["status"] == "ok" else 503)

    @router.api_route("/anthropic", methods=["GET", "HEAD"])
    async def anthropic_base() -> Response:  # pyright: ignore[reportUnusedFunction]
        """200: some clients probe their base URL before they use it."""
        return Response(status_code=200)

    return router
