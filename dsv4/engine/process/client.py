"""EngineProcess: the interface of AsyncEngine over an engine in a process of its own, started again if it crashes."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, cast

from dsv4.engine.errors import EngineCrashedError, EngineError, GrammarError, QueueFullError
from dsv4.engine.fairness import User
from dsv4.engine.metrics import Metric, MetricRegistry, counter, gauge
from dsv4.engine.outputs import EventStream, TokenStream
from dsv4.engine.process.child import Child
from dsv4.engine.process.messages import Close, CollectMetrics, LoadFailed, Ready, Reserve, Stopped, Trace, pack_tokens
from dsv4.engine.process.restarts import RestartPolicy
from dsv4.engine.process.served_model import ServedModel
from dsv4.engine.process.suspects import Flight, Suspects, prompt_hash
from dsv4.engine.process.watchdog import StuckWatch
from dsv4.engine.sampling_params import SamplingParams
from dsv4.model.token_trace import TokenTrace

METRICS_SECONDS = 5.0  # that a look at the metrics waits for the process
CLOSE_SECONDS = 60.0  # for the running step and what the process writes at its end

logger = logging.getLogger("dsv4.engine")


class EngineProcess:
    """Runs an AsyncEngine in a process of its own, until `close`.

    A crash ends the requests in flight with EngineCrashedError, and the process is started again; after several in a
    row (`restarts`) it is given up: then `error` is an EngineError, as after a failure that would come again. A prompt
    that has crashed it twice is refused (`suspects.py`). Waits for the model; raises the errors of loading,
    ChildProcessError if the process ends before.
    """

    def __init__(
        self,
        make: Callable[[], Any],
        restarts: RestartPolicy | None = None,
        compile_seconds: float = 10.0,
        stuck_seconds: float = 0.0,
        queue_seconds: float = 0.0,
    ) -> None:
        """`make`: returns the LLM, in the process: a function of a module, or a partial of one. `compile_seconds`: for
        the constraint of a request; GrammarError after that. `stuck_seconds`: a process with requests that takes no
        step for so long is killed, which is a crash; 0: never. `queue_seconds`: that a suspect may wait for its
        trial, as EngineConfig's max_queue_seconds in the process.
        """
        self.error: BaseException | None = None
        self.num_restarts = 0
        self.metrics = MetricRegistry()
        self.metrics.add(_ProcessMetrics(self))
        self._make = make
        self._restarts = restarts or RestartPolicy()
        self._compile_seconds = compile_seconds
        self._queue_seconds = queue_seconds
        self._suspects = Suspects()
        self._ids = itertools.count(1)
        self._child: Child | None = None  # that has loaded the model
        self._starting: Child | None = None  # the same, or one that loads it
        self._lock = threading.Lock()  # guards _child, _starting, _closed and error
        self._closed = False
        self._closing = threading.Event()
        self._load_seconds = 0.0
        loaded: Future[ServedModel] = Future()
        # The process dies with the thread that started it: this one lives as long as the engine.
        self._supervisor = threading.Thread(
            target=self._supervise, args=(loaded,), name="dsv4-engine-process", daemon=True
        )
        self._supervisor.start()
        if stuck_seconds:
            watching = threading.Thread(target=self._watch, args=(StuckWatch(stuck_seconds),), daemon=True)
            watching.start()
        try:
            self.llm = loaded.result()
        except BaseException:
            self.close()
            raise

    @property
    def healthy(self) -> bool:
        return self.error is None and not self._closed

    @property
    def pid(self) -> int | None:
        """Id of the process, None while there is none."""
        child = self._child
        return None if child is None else child.pid

    @property
    def num_running(self) -> int:
        child = self._child
        return 0 if child is None else child.state.num_running

    @property
    def num_waiting(self) -> int:
        child = self._child
        return 0 if child is None else child.state.num_waiting

    @property
    def num_steps(self) -> int:
        """Steps of the present process."""
        child = self._child
        return 0 if child is None else child.state.num_steps

    def stream(self, prompt_token_ids: list[int], params: SamplingParams, user: User = ("",)) -> TokenStream:
        """As of AsyncEngine; the caller's thread waits until the process has validated the request.

        PromptRefusedError for a prompt that has crashed the process twice.
        """
        events = self._events(_Reservation(self, prompt_token_ids, params, user), watched=False)
        return cast(TokenStream, events)

    def stream_with_progress(
        self, prompt_token_ids: list[int], params: SamplingParams, user: User = ("",)
    ) -> EventStream:
        """As of AsyncEngine; waits as `stream`."""
        return self._events(_Reservation(self, prompt_token_ids, params, user), watched=True)

    async def trace(self, token_ids: list[int]) -> TokenTrace:
        """As of AsyncEngine."""
        tokens, child = pack_tokens(token_ids), self.running_child()
        number, reply = child.call(lambda number: Trace(number, tokens))
        try:
            return await asyncio.shield(asyncio.wrap_future(reply))  # a cancelled reply could not be given its value
        except asyncio.CancelledError:
            child.drop(number)
            raise

    def check_room(self) -> None:
        """Raises QueueFullError if the process has said that no request may wait; does not ask it."""
        child = self._child
        if child is not None and child.state.full is not None:
            raise QueueFullError(child.state.full)

    def check(self) -> None:
        """Raises EngineError unless the process is there, EngineCrashedError while it is started again."""
        self.running_child()

    def close(self) -> None:
        """Ends the process after its running step; unfinished requests get EngineError. Again: does nothing.

        Kills it after CLOSE_SECONDS: a process that is stopped, or hangs, never hears that it should end.
        """
        with self._lock:
            self._closed = True
            child = self._starting
        self._closing.set()
        if child is not None:
            child.send(Close())
            self._supervisor.join(CLOSE_SECONDS)
            if self._supervisor.is_alive():
                logger.warning("the engine process did not end within %g s and is killed", CLOSE_SECONDS)
                child.kill("did not end when the engine was closed")
        self._supervisor.join()

    def running_child(self) -> Child:
        """The process. EngineError as `check`."""
        with self._lock:
            if self._closed:
                raise EngineError("the engine is closed")
            if self.error is not None:
                raise self.error.with_traceback(None)  # else each caller's frames would stay with it
            assert self._child is not None
            return self._child

    def reserve(self, prompt_token_ids: list[int], params: SamplingParams, user: User) -> tuple[Child, int, str]:
        """The process that has validated a request, the request's id there, and the hash of its prompt."""
        child, prompt = self.running_child(), pack_tokens(prompt_token_ids)
        key = prompt_hash(prompt)
        self._suspects.check(key)
        number, reply = child.call(lambda number: Reserve(number, prompt, params, user))
        try:
            reply.result(self._compile_seconds if params.is_constrained else None)
        except TimeoutError as error:
            child.drop(number)  # its answer, if it comes, is dropped too
            raise GrammarError(params.constraint_field, f"it takes longer than {self._compile_seconds:g} s") from error
        return child, number, key

    async def _events(self, reservation: _Reservation, watched: bool) -> EventStream:
        flight: Flight | None = None
        is_complete: bool | None = False
        try:
            async with self._suspects.flight(reservation.key, self._queue_seconds) as flight:
                reservation.child.start(reservation.id, flight, watched)
                async for event in flight:
                    is_complete = yield event
                    if is_complete:
                        break
        finally:
            reservation.release(flight is not None and flight.finished, bool(is_complete))

    def _watch(self, watch: StuckWatch) -> None:
        """Kills a process that does not move; in a thread of its own."""
        while not self._closing.wait(watch.interval):
            child = self._child
            verdict = None if child is None else watch.verdict(child, child.activity)
            if child is not None and verdict is not None:
                child.kill(verdict)

    # The methods below run in the supervising thread.

    def _supervise(self, first: Future[ServedModel]) -> None:
        """Keeps a process running until the engine is closed or given up. `first`: gets the model once it is loaded."""
        while (child := self._start()) is not None:
            began, ready_at = time.monotonic(), 0.0
            refusal: BaseException | None = None

            def on_loaded(message: Ready | LoadFailed, child: Child = child, began: float = began) -> None:
                nonlocal ready_at, refusal
                if isinstance(message, LoadFailed):
                    refusal = message.error.error()
                    return
                ready_at = time.monotonic()
                self._load_seconds = ready_at - began
                model = ServedModel(message.model)
                with self._lock:
                    self._child, self.error = child, None
                if first.done():
                    logger.warning("the engine process has been started again; requests are taken")
                else:
                    first.set_result(model)

            stopped = child.read(on_loaded)
            if not first.done():
                reason = f"{child.describe_end()}, while it loaded the model"
                first.set_exception(refusal or ChildProcessError(reason))
                child.fail(EngineError(reason))
                return
            served = time.monotonic() - ready_at if ready_at else 0.0
            pause = self._after_end(child, refusal, stopped, served)
            if pause is None or self._closing.wait(pause):
                break

    def _start(self) -> Child | None:
        """A new process; None if the engine is closed."""
        with self._lock:
            if self._closed:
                return None
            self._starting = child = Child(self._make, self._ids)
            return child

    def _after_end(
        self, child: Child, refusal: BaseException | None, stopped: Stopped | None, served_seconds: float
    ) -> float | None:
        """Ends the requests of a process that has ended; seconds until the next start, None: there is none."""
        error, pause = self._judge(child, refusal, stopped, served_seconds)
        with self._lock:  # both at once: a caller finds the process or the error
            self._starting = self._child = None
            closed = self._closed
            if not closed:
                self.error = error
        if closed:
            child.fail(EngineError("the engine is closed"))
            return None
        self._suspects.blame()
        logger.error("%s", error)
        child.fail(error)
        if pause is not None:
            self.num_restarts += 1
        return pause

    def _judge(
        self, child: Child, refusal: BaseException | None, stopped: Stopped | None, served_seconds: float
    ) -> tuple[EngineError, float | None]:
        """Error of requests from now on, and seconds until the next start, None: there is none."""
        if stopped is not None and stopped.lasting:
            return EngineError(f"the engine has failed: {stopped.reason}"), None
        if stopped is not None:
            reason = f"the engine has failed: {stopped.reason}"
        elif refusal is not None:
            reason = f"the engine process cannot load the model again: {refusal}"
        else:
            reason = child.describe_end()
        pause = self._restarts.pause_after_crash(served_seconds)
        if pause is None:
            times = self._restarts.num_crashes
            return EngineError(f"{reason}; it has ended {times} times in a row and is not started again"), None
        return EngineCrashedError(f"{reason}; it is started again", pause + self._load_seconds), pause


class _Reservation:
    """A validated request of one process. Its place is given back when it is dropped."""

    def __init__(self, engine: EngineProcess, prompt_token_ids: list[int], params: SamplingParams, user: User) -> None:
        self.child, self.id, self.key = engine.reserve(prompt_token_ids, params, user)
        self._drop = weakref.finalize(self, self.child.drop, self.id)
        self._drop.atexit = False

    def release(self, finished: bool, complete: bool) -> None:
        """Stops the request unless it has finished. `complete`: see Drop."""
        if finished:
            self.child.forget(self.id)
            self._drop.detach()
        elif complete:
            self._drop.detach()
            self.child.drop(self.id, complete=True)
        else:
            self._drop()


class _ProcessMetrics:
    """Metrics of the process's engine, and of the process."""

    def __init__(self, engine: EngineProcess) -> None:
        self._engine = weakref.ref(engine)

    def metrics(self) -> Iterator[Metric]:
        engine = self._engine()
        if engine is None:
            return
        yield gauge("dsv4:engine_up", "1 while the engine process takes requests.", float(engine.healthy))
        yield counter("dsv4:engine_restarts", "Starts of the engine process after a crash.", engine.num_restarts)
        try:
            _, reply = engine.running_child().call(CollectMetrics)
            metrics: list[Metric] = reply.result(METRICS_SECONDS)
        except (EngineError, TimeoutError):
            return
        yield from metrics
