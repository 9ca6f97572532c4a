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
from dsv4.engine.errors import EngineCrashedError, PromptRefusedError, QueueTimeoutError
from dsv4.engine.interface import Engine
from dsv4.engine.sampling_params import SamplingParams
from dsv4.server.drain import Drain
from dsv4.server.errors import retry_after
from dsv4.server.loading_app import RETRY_SECONDS
from dsv4.server.openapi import operation
from dsv4.server.schemas import Health
from dsv4.server.served_models import ServedModel, ServedModels

DEEP_SECONDS = 30.0  # a step of a large model on a CPU may take half of it
MIN_SECONDS, MAX_SECONDS = 1.0, 600.0  # that a caller may wait
_POLL_SECONDS = 0.05
_OPERATION = operation(None, Health, unavailable=Health, tag="health")


class DeepCheck:
    """Computes one token with each engine. Calls at the same time share one check: it costs no more than one token."""

    def __init__(self, models: ServedModels) -> None:
        self._models = models
        self._running: dict[str, asyncio.Task[dict[str, Any] | None]] = {}

    async def run(self, seconds: float) -> dict[str, Any]:
        """State of each model by name: `status`, and the `seconds` that it took. See `check_engine`."""
        models = list(self._models)
        states = await asyncio.gather(*(self._wait(model, seconds) for model in models))
        return {model.name: state for model, state in zip(models, states, strict=True)}

    async def _wait(self, model: ServedModel, seconds: float) -> dict[str, Any]:
        """State of a model. A caller that waits no longer judges by the steps of its own time; the check goes on.

        A token that had no turn within the time is no fault of an engine that took steps meanwhile: "busy", else
        "stuck".
        """
        began, steps = time.monotonic(), model.engine.num_steps
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while (state := await asyncio.shield(self._shared(model))) is None:
                    pass
                return state
        return _state("busy" if model.engine.num_steps > steps else "stuck", began)

    def _shared(self, model: ServedModel) -> asyncio.Task[dict[str, Any] | None]:
        running = self._running.get(model.name)
        if running is None or running.done():
            running = self._running[model.name] = asyncio.create_task(check_engine(model.engine))
        return running


async def check_engine(engine: Engine) -> dict[str, Any] | None:
    """Computes a token: "ok"; "busy" if it may not wait and the engine takes steps; "error" if the engine has stopped.

    None after MAX_SECONDS.
    """
    began, steps = time.monotonic(), engine.num_steps
    params = SamplingParams(max_tokens=1, temperature=0.0, cache_salt="dsv4: deep health check")
    try:
        async with asyncio.timeout(MAX_SECONDS):
            try:
                # In a thread: an engine in another process is waited for.
                start = partial(engine.stream, [engine.llm.config.bos_token_id], params)
                async with contextlib.aclosing(await asyncio.to_thread(start)) as events:
                    async for _ in events:
                        pass
            except (QueueFullError, QueueTimeoutError):
                while engine.num_steps == steps:
                    engine.check()
                    await asyncio.sleep(_POLL_SECONDS)
                return _state("busy", began)
    except TimeoutError:
        return None
    except (EngineError, PromptRefusedError) as stopped:
        return _state("error", began) | {"error": str(stopped)}
    return _state("ok", began)


def _state(status: str, began: float) -> dict[str, Any]:
    return {"status": status, "seconds": round(time.monotonic() - began, 3)}


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
        deep_wanted: bool = Query(False, alias="deep"),
        seconds: float = Query(DEEP_SECONDS, ge=MIN_SECONDS, le=MAX_SECONDS),
    ) -> JSONResponse:
        """200 while requests are accepted, 503 if an engine has failed (with the reason) or the server is draining.

        With `deep` a token is computed, within `seconds`: 503 too if the engine does not move.
        """
        if deep_wanted:
            return await deep(seconds)
        return _answer(shallow())

    @router.get("/health/deep", **_OPERATION)
    async def deep_health(
        seconds: float = Query(DEEP_SECONDS, ge=MIN_SECONDS, le=MAX_SECONDS),
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
