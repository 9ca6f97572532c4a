"""EngineReplica: an engine in a process of Ray's, as Ray Serve calls it."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from array import array
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from dsv4.engine.cluster.library import ray_module
from dsv4.engine.cluster.messages import RETRY_SECONDS, Events, ReplicaState
from dsv4.engine.errors import EngineCrashedError, EngineError, GrammarError
from dsv4.engine.fairness import User
from dsv4.engine.listeners import Item, QueueListener
from dsv4.engine.process.messages import EngineState, pack
from dsv4.engine.process.portable_errors import PortableError
from dsv4.engine.process.served_model import ModelFacts
from dsv4.engine.process.watchdog import Activity, StuckWatch
from dsv4.engine.sampling_params import SamplingParams
from dsv4.model.token_trace import TokenTrace
from dsv4.prefix_digests import DIGEST_BYTES

if TYPE_CHECKING:
    from dsv4.engine.async_engine import AsyncEngine
    from dsv4.engine.llm import LLM
    from dsv4.engine.request import Request

REPORTED_BLOCKS = 4096  # a megabyte of text or two, of the prefixes used last; 32 KB of digests
_COMPILING_THREADS = 2  # constraints compiled at a time
_GOODBYE_SECONDS = 0.5  # for requests that are told of the engine's failure

logger = logging.getLogger("dsv4.engine")


class EngineReplica:
    """Loads a model and runs an AsyncEngine until Ray ends the process. Errors for callers are PortableErrors: Ray
    would wrap exceptions."""

    def __init__(self, make: Callable[[], LLM], compile_seconds: float, stuck_seconds: float = 0.0) -> None:
        """`make`: returns the LLM. `compile_seconds`: for the constraint of a request; GrammarError after that.
        `stuck_seconds`: an engine with requests that takes no step for so long ends the process; 0: never.
        """
        from dsv4.engine.async_engine import AsyncEngine  # torch: the server's process has this module too

        self._replica: str = ray_module("ray.serve").get_replica_context().replica_id.unique_id
        self._compile_seconds = compile_seconds
        self._compiling = ThreadPoolExecutor(_COMPILING_THREADS, "dsv4-compile")
        self._ended = 0  # requests
        self._failure: PortableError | None = None
        self._engine: AsyncEngine | None = None
        self._was_healthy = False
        try:
            llm = make()
            self._facts = ModelFacts.of(llm)
            self._engine = AsyncEngine(llm)
        except Exception as error:  # `model` tells it: Ray would try again, and report a text
            logger.error("the model cannot be loaded: %s: %s", type(error).__name__, error)
            self._failure = PortableError.of(error)
            return
        watching = (self._engine, StuckWatch(stuck_seconds) if stuck_seconds else None)
        threading.Thread(target=self._watch, args=watching, name="dsv4-watch", daemon=True).start()

    async def model(self) -> ModelFacts | PortableError:
        """Facts of the model, or the error of loading it."""
        return self._facts if self._failure is None else self._failure

    async def generate(
        self,
        prompt_token_ids: array[int] | list[int],
        params: SamplingParams,
        user: User,
        watched: bool,
        digests: Sequence[bytes] = (),
    ) -> AsyncGenerator[Events | PortableError, None]:
        """Events of a request, after a first answer without any; an error ends them. `digests` are for the router."""
        try:
            request = await self._reserve(list(prompt_token_ids), params, user)
        except Exception as error:
            yield PortableError.of(error)
            return
        yield Events(self._replica, (), self._present_state())
        queue: asyncio.Queue[Item] = asyncio.Queue()
        finished = False
        try:
            self._running_engine().start(request, QueueListener(queue, asyncio.get_running_loop()), watched)
            while not finished:
                items = [await queue.get()]
                while not queue.empty():
                    items.append(queue.get_nowait())
                error = next((item for item in items if isinstance(item, EngineError)), None)
                events = [item for item in items if not isinstance(item, EngineError)]
                finished = error is not None or getattr(events[-1], "finish_reason", None) is not None
                if events:
                    yield Events(self._replica, [pack(event) for event in events], self._present_state())
                if error is not None:
                    yield self._portable(error)
        except EngineError as error:
            yield self._portable(error)
        finally:
            self._ended += 1
            if not finished and self._engine is not None:
                self._engine.abort(request)

    async def trace(self, token_ids: array[int] | list[int]) -> TokenTrace | PortableError:
        """As of AsyncEngine."""
        try:
            return await self._running_engine().trace(list(token_ids))
        except Exception as error:
            return PortableError.of(error)

    async def state(self, with_metrics: bool = False) -> ReplicaState:
        """Counts, and with `with_metrics` the engine's metrics."""
        metrics = list(self._engine.metrics.collect()) if with_metrics and self._engine is not None else []
        return ReplicaState(self._replica, self._present_state(), metrics)

    def check_health(self) -> None:
        """For Ray, which replaces the process after an error; the first time `model` has to tell one of loading."""
        if self._was_healthy:
            self._running_engine().check()
        self._was_healthy = True

    async def record_routing_stats(self) -> dict[str, Any]:
        """For Ray, which gives it to the router: see `prefix_index.PrefixIndex.report`."""
        ended, digests = self._ended, list[bytes]()
        if self._engine is not None and self._engine.healthy:
            digests = await self._engine.stored_digests(REPORTED_BLOCKS)
        assert all(len(digest) == DIGEST_BYTES for digest in digests)
        return {"ended": ended, "blocks": b"".join(digests)}

    def _portable(self, error: EngineError) -> PortableError:
        """The error of a request that the engine's failure has ended, as of `EngineProcess`."""
        cause = None if self._engine is None else self._engine.error
        if cause is not None and not isinstance(cause, EngineError):
            error = EngineCrashedError(f"{error}; it is started again", RETRY_SECONDS)
        return PortableError.of(error)

    def _running_engine(self) -> AsyncEngine:
        if self._engine is None:
            assert self._failure is not None
            raise EngineError(f"the engine process cannot load the model again: {self._failure.text}")
        return self._engine

    async def _reserve(self, prompt_token_ids: list[int], params: SamplingParams, user: User) -> Request:
        engine = self._running_engine()
        if not params.is_constrained:
            return engine.reserve(prompt_token_ids, params, user)
        loop = asyncio.get_running_loop()
        compiled = loop.run_in_executor(self._compiling, engine.reserve, prompt_token_ids, params, user)
        try:
            return await asyncio.wait_for(compiled, self._compile_seconds)
        except TimeoutError as error:
            reason = f"it takes longer than {self._compile_seconds:g} s"
            raise GrammarError(params.constraint_field, reason) from error

    def _present_state(self) -> EngineState:
        return EngineState() if self._engine is None else EngineState.of(self._engine)

    def _watch(self, engine: AsyncEngine, watch: StuckWatch | None) -> None:
        """Ends the process soon after its engine has failed: Ray then starts another, and the router knows."""
        verdict = standstill(engine, watch)
        if verdict is not None:
            logger.error("the engine %s; its process ends", verdict)
            os._exit(1)
        if engine.error is not None:
            threading.Event().wait(_GOODBYE_SECONDS)
            os._exit(1)


def standstill(engine: AsyncEngine, watch: StuckWatch | None) -> str | None:
    """Waits until an engine has failed or is closed, or `watch` says what is wrong with it: that, in words."""
    while not engine.join(1.0 if watch is None else watch.interval):
        requests = engine.num_running + engine.num_waiting
        verdict = watch and watch.verdict(engine, Activity(engine.num_steps, engine.num_steps, requests, 0))
        if verdict is not None:
            return verdict
    return None
