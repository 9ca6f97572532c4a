"""Probes of load balancers and clients: GET /health, shallow and deep, and the base URL of Anthropic's API."""

from __future__ import annotations

import asyncio
import contextlib
import time
from functools import partial
from typing import Any

from fastapi import APIRouter, Query
from starlette.responses import JSONResponse, Response

from dsv4.engine import EngineError, QueueFullError
from dsv4.engine.errors import PromptRefusedError
from dsv4.engine.interface import Engine
from dsv4.engine.process.client import EngineCrashedError
from dsv4.engine.sampling_params import SamplingParams
from dsv4.server.drain import Drain
from dsv4.server.errors import retry_after
from dsv4.server.loading_app import RETRY_SECONDS
from dsv4.server.openapi import operation
from dsv4.server.schemas import Health
from dsv4.server.served_models import ServedModels

DEEP_SECONDS = 30.0  # a step of a large model on a CPU may take half of it
_POLL_SECONDS = 0.05
_OPERATION = operation(None, Health, unavailable=Health, tag="health")


class DeepCheck:
    """Computes one token with each engine. Calls at the same time share one check: it costs no more than one token."""

    def __init__(self, models: ServedModels) -> None:
        self._models = models
        self._running: asyncio.Task[dict[str, Any]] | None = None

    async def run(self, seconds: float) -> dict[str, Any]:
        """State of each model by name: `status`, and the `seconds` that it took. See `check_engine`."""
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._check(seconds))
        return await asyncio.shield(self._running)

    async def _check(self, seconds: float) -> dict[str, Any]:
        models = list(self._models)
        states = await asyncio.gather(*(check_engine(model.engine, seconds) for model in models))
        return {model.name: state for model, state in zip(models, states, strict=True)}


async def check_engine(engine: Engine, seconds: float) -> dict[str, Any]:
    """Computes a token within `seconds`: "ok"; "error" for an engine that has stopped.

    A token that had no turn within the time is no fault of an engine that took steps meanwhile: "busy", else "stuck".
    """
    began, steps = time.monotonic(), engine.num_steps
    status, error = "ok", None
    params = SamplingParams(max_tokens=1, temperature=0.0, cache_salt="dsv4: deep health check")
    try:
        async with asyncio.timeout(seconds):
            try:
                # In a thread: an engine in another process is waited for.
                start = partial(engine.stream, [engine.llm.config.bos_token_id], params)
                async with contextlib.aclosing(await asyncio.to_thread(start)) as events:
                    async for _ in events:
                        pass
            except QueueFullError:
                while engine.num_steps == steps:
                    engine.check()
                    await asyncio.sleep(_POLL_SECONDS)
                status = "busy"
    except TimeoutError:
        status = "busy" if engine.num_steps > steps else "stuck"
    except (EngineError, PromptRefusedError) as stopped:
        status, error = "error", str(stopped)
    state: dict[str, Any] = {"status": status, "seconds": round(time.monotonic() - began, 3)}
    return state if error is None else state | {"error": error}


def health_router(models: ServedModels, drain: Drain) -> APIRouter:
    router = APIRouter()
    deep_check = DeepCheck(models)

    def shallow() -> dict[str, Any]:
        engines = [model.engine for model in models]
        state: dict[str, Any] = {
            "status": "ok",
            "running": sum(engine.num_running for engine in engines),
            "waiting": sum(engine.num_waiting for engine in engines),
        }
        failed = next((engine for engine in engines if not engine.healthy), None)
        if failed is not None:
            state["status"] = "restarting" if isinstance(failed.error, EngineCrashedError) else "error"
            state["error"] = str(failed.error or "the engine is closed")
        elif drain.draining:
            state["status"] = "draining"
        return state

    async def deep(seconds: float) -> JSONResponse:
        state = shallow()
        if state["status"] == "ok":
            state["models"] = found = await deep_check.run(seconds)
            bad = [model["status"] for model in found.values() if model["status"] not in ("ok", "busy")]
            state["status"] = bad[0] if bad else "ok"
        return _answer(state)

    @router.get("/health", **_OPERATION)
    async def health(
        deep_wanted: bool = Query(False, alias="deep"), seconds: float = Query(DEEP_SECONDS, gt=0, le=600)
    ) -> JSONResponse:
        """200 while requests are accepted, 503 if an engine has failed (with the reason) or the server is draining.

        With `deep` a token is computed, within `seconds`: 503 too if the engine does not move.
        """
        if deep_wanted:
            return await deep(seconds)
        return _answer(shallow())

    @router.get("/health/deep", **_OPERATION)
    async def deep_health(
        seconds: float = Query(DEEP_SECONDS, gt=0, le=600),
    ) -> JSONResponse:
        """The same as /health?deep=1."""
        return await deep(seconds)

    for path, probe in (("/health", health), ("/health/deep", deep_health)):  # of load balancers that send HEAD
        router.add_api_route(path, probe, methods=["HEAD"], include_in_schema=False)

    @router.api_route("/anthropic", methods=["GET", "HEAD"], include_in_schema=False)
    async def anthropic_base() -> Response:  # pyright: ignore[reportUnusedFunction]
        """200: some clients probe their base URL before they use it."""
        return Response(status_code=200)

    return router


def _answer(state: dict[str, Any]) -> JSONResponse:
    """200, or 503, with Retry-After where the server will take requests again."""
    if state["status"] == "ok":
        return JSONResponse(state)
    return JSONResponse(state, 503, retry_after(RETRY_SECONDS) if state["status"] == "restarting" else None)
