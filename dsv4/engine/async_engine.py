"""AsyncEngine: concurrent requests from asyncio, computed by one background thread."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar, cast

from dsv4.engine.core import CHECK_SECONDS, EngineCore
from dsv4.engine.errors import EngineError, GrammarError, QueueTimeoutError
from dsv4.engine.fairness import User
from dsv4.engine.listeners import Listener, QueueListener, is_last
from dsv4.engine.llm import LLM
from dsv4.engine.metrics import MetricRegistry
from dsv4.engine.outputs import EventStream, FinishReason, ProgressEvent, TokenEvent, TokenStream
from dsv4.engine.progress import ProgressWatch
from dsv4.engine.request import Request
from dsv4.engine.sampling_params import SamplingParams
from dsv4.engine.tracing import Tracing
from dsv4.engine.waiting import WaitingRoom
from dsv4.model.token_trace import TokenTrace

logger = logging.getLogger("dsv4.engine")

T = TypeVar("T")


class AsyncEngine:
    """Claims an LLM and steps it in a thread until `close`; the LLM itself refuses calls meanwhile.

    `stream` is for asyncio. `reserve`, `start` and `abort` are the same for callers that have threads only.
    """

    def __init__(self, llm: LLM, compile_seconds: float | None = None) -> None:
        """`compile_seconds`: for the constraint of a request; GrammarError after that. None: as long as it takes."""
        llm.claim()
        self._compile_seconds = compile_seconds
        self.llm = llm
        self.error: BaseException | None = None
        self.num_steps = 0  # that have been computed
        self._core: EngineCore = llm.core
        self._room = WaitingRoom(llm.engine_config)
        self.after_step: Callable[[], None] = lambda: None  # called in the engine thread after every step
        self._listeners: dict[int, Listener] = {}
        self._watch = ProgressWatch()
        self._queue_checked = 0.0  # time of the last look for requests that have waited too long
        self._tracing = asyncio.Lock()  # one trace at a time: each has a cache of its own
        self._commands: list[Callable[[], None]] = []
        self._wake = threading.Condition()  # guards _commands, _closed and error
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="dsv4-engine", daemon=True)
        self._thread.start()

    @property
    def healthy(self) -> bool:
        return self.error is None and not self._closed

    @property
    def num_running(self) -> int:
        return len(self._core.scheduler.running)

    @property
    def num_waiting(self) -> int:
        return len(self._core.scheduler.waiting)

    @property
    def metrics(self) -> MetricRegistry:
        """Metrics of the engine; safe to collect from any thread."""
        return self._core.metrics

    def stream(self, prompt_token_ids: list[int], params: SamplingParams, user: User = ("",)) -> TokenStream:
        """Yields the request's events; closing or dropping the generator stops the request, as does `complete`.

        Raises ValueError at once for a prompt that cannot run, and QueueFullError if too many wait. The call reserves
        the request's place in the queue; the request is submitted when iteration begins. If the engine stops,
        iteration raises EngineError. Safe from any thread. `user`: the engine is shared fairly among users
        (`fairness.py`).
        """
        events = self._events(self.reserve(prompt_token_ids, params, user), watched=False)
        return cast(TokenStream, events)

    def stream_with_progress(
        self, prompt_token_ids: list[int], params: SamplingParams, user: User = ("",)
    ) -> EventStream:
        """As `stream`, with ProgressEvents before the first token.

        The first ProgressEvent comes at once, the last with the first token, others at most several times per second.
        """
        return self._events(self.reserve(prompt_token_ids, params, user), watched=True)

    async def trace(self, token_ids: list[int]) -> TokenTrace:
        """Trace of the last token of a sequence (`dsv4.model.trace`), computed anew beside the requests.

        The work is cut in steps of a few hundred tokens, which take turns with the engine's own. ValueError for a model
        or a sequence that cannot be traced (`Tracing`), EngineError if the engine stops. Cancelling it frees its cache.
        """
        config = self.llm.engine_config
        tracing = Tracing(self._core.runner.model, token_ids, self.llm.max_model_len, config.kv_cache_dtype)
        async with self._tracing:
            while (trace := await self._between_steps(tracing.step)) is None:
                pass
        return trace

    async def stored_digests(self, limit: int) -> list[bytes]:
        """Digests of stored blocks (`PrefixCache.digests`), looked up between two steps. EngineError if it stops."""
        prefixes = self._core.scheduler.cache_manager.prefixes
        return [] if prefixes is None else await self._between_steps(lambda: prefixes.digests(limit))

    def check_room(self) -> None:
        """Raises QueueFullError if a request of any length would: callable before the prompt is encoded."""
        self._room.check()

    def check(self) -> None:
        """Raises EngineError if the engine has failed or is closed."""
        with self._wake:
            self._raise_if_stopped()

    def close(self) -> None:
        """Stops the thread and releases the LLM; unfinished requests get EngineError. A second call does nothing."""
        with self._wake:
            was_closed, self._closed = self._closed, True
            self._wake.notify()
        self._thread.join()
        if not was_closed:
            self.llm.release()

    def join(self, seconds: float) -> bool:
        """Waits until the engine has failed or is closed; False if it still runs after `seconds`."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def reserve(self, prompt_token_ids: list[int], params: SamplingParams, user: User = ("",)) -> Request:
        """New validated request with a place in the queue, kept while it is referenced. Errors as of `stream`."""

        def make() -> Request:
            return self._core.new_request(prompt_token_ids, params, user)

        limited = params.is_constrained and self._compile_seconds is not None
        request = self._in_time(make, params) if limited else make()
        self._room.add(request)
        return request

    def start(self, request: Request, listener: Listener, watched: bool) -> None:
        """Submits a request; `watched`: with ProgressEvents. EngineError if the engine has stopped."""
        if watched:  # now, not after the running step, which may take seconds
            listener.send(request.progress(time.monotonic(), self.num_waiting))
        self._submit(lambda: self._start(request, listener, watched))

    def abort(self, request: Request, reason: FinishReason = "abort") -> None:
        """Stops a request that was started; does nothing where it has ended or the engine has stopped.

        `reason`: for which it counts as ended.
        """
        with contextlib.suppress(EngineError):  # a stopped engine has nothing to abort
            self._submit(lambda: self._abort(request, reason))

    def _in_time(self, make: Callable[[], Request], params: SamplingParams) -> Request:
        """`make()`, whose constraint is compiled in a thread of its own. GrammarError if that takes too long."""
        made: Future[Request] = Future()

        def run() -> None:
            try:
                made.set_result(make())
            except BaseException as error:  # the caller gets it
                made.set_exception(error)

        threading.Thread(target=run, name="dsv4-compile", daemon=True).start()
        try:
            return made.result(self._compile_seconds)
        except TimeoutError as error:
            reason = f"it takes longer than {self._compile_seconds:g} s"
            raise GrammarError(params.constraint_field, reason) from error

    async def _events(self, request: Request, watched: bool) -> EventStream:
        listener = QueueListener(asyncio.Queue(), asyncio.get_running_loop())
        self.start(request, listener, watched)
        is_complete: bool | None = False
        try:
            async for event in listener:
                is_complete = yield event
                if is_complete:
                    break
        finally:
            if not listener.finished:
                self.abort(request, "stop" if is_complete else "abort")

    async def _between_steps(self, work: Callable[[], T]) -> T:
        """Result of `work`, run in the engine thread between two steps. Its errors are raised here."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._submit(lambda: _fulfil(future, work))
        while not (await asyncio.wait((future,), timeout=CHECK_SECONDS))[0]:
            self.check()
        return future.result()

    def _submit(self, command: Callable[[], None]) -> None:
        """Hands a command to the engine thread, which runs it between two steps."""
        with self._wake:
            self._raise_if_stopped()
            self._commands.append(command)
            self._wake.notify()

    def _raise_if_stopped(self) -> None:
        if self.error is not None:
            raise EngineError(f"the engine has failed: {self.error}") from self.error
        if self._closed:
            raise EngineError("the engine is closed")

    # The methods below run in the engine thread.

    def _run(self) -> None:
        try:
            while (commands := self._next_commands()) is not None:
                for command in commands:
                    command()
                self._core.check_files()
                self._give_up(time.monotonic())
                has_work = self._core.has_work
                events = self._core.step()
                self.num_steps += has_work
                for request, progress in self._watch.reports(self._core.scheduler.waiting, time.monotonic()):
                    self._deliver(request, progress)
                for request, event in events:
                    self._deliver(request, event)
                self.after_step()
        except BaseException as error:  # every waiting client must be told
            logger.error("the engine has stopped: %s: %s", type(error).__name__, error)
            with self._wake:
                self.error = error
        self._fail_listeners()

    def _next_commands(self) -> list[Callable[[], None]] | None:
        """Waits for commands, for work, or until the next file check is due. None: the engine is closed."""
        with self._wake:
            self._wake.wait_for(lambda: self._closed or self._commands or self._core.has_work, CHECK_SECONDS)
            if self._closed:
                return None
            commands, self._commands = self._commands, []
            return commands

    def _start(self, request: Request, listener: Listener, watched: bool) -> None:
        self._listeners[request.request_id] = listener
        if watched:
            self._watch.add(request)
        self._core.add(request)

    def _abort(self, request: Request, reason: FinishReason = "abort") -> None:
        self._listeners.pop(request.request_id, None)
        self._watch.discard(request)
        self._core.abort(request, reason)

    def _give_up(self, now: float) -> None:
        """Ends requests that have waited too long without being begun; looks once per second."""
        limit = self.llm.engine_config.max_queue_seconds
        if not limit or now - self._queue_checked < min(CHECK_SECONDS, limit):
            return
        self._queue_checked = now
        waiting = self._core.scheduler.waiting
        for request in [r for r in waiting if r.scheduled_time is None and now - r.arrival_time > limit]:
            listener = self._listeners.get(request.request_id)
            self._abort(request)
            if listener is not None:
                with contextlib.suppress(RuntimeError):  # nobody reads it
                    listener.send(QueueTimeoutError(f"the request waited for {limit:g} s and was not begun"))

    def _deliver(self, request: Request, event: TokenEvent | ProgressEvent) -> None:
        listener = self._listeners.get(request.request_id)
        if listener is None:  # aborted: the previous event could not be delivered
            return
        try:
            listener.send(event)
        except RuntimeError:  # the client's event loop is closed: nobody reads this request
            self._abort(request)
        if is_last(event):
            self._listeners.pop(request.request_id, None)

    def _fail_listeners(self) -> None:
        message = f"the engine has failed: {self.error}" if self.error is not None else "the engine is closed"
        with self._wake:
            commands, self._commands = self._commands, []
        for command in commands:  # requests submitted too late still get an answer
            command()
        for listener in self._listeners.values():
            with contextlib.suppress(RuntimeError):  # nobody reads it
                listener.send(EngineError(message))
        self._listeners.clear()
        self._core.abort_all()  # else the LLM would continue them after its release


def _fulfil(future: asyncio.Future[T], work: Callable[[], T]) -> None:
    """Runs work and hands its result or error to a future of another thread's loop."""
    if future.cancelled():
        return
    try:
        result, error = work(), None
    except Exception as caught:
        result, error = None, caught

    def deliver() -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(cast(T, result))

    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
        future.get_loop().call_soon_threadsafe(deliver)
