"""AsyncEngine: many requests at a time from asyncio, computed by one background thread."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import cast

from dsv4.engine.core import CHECK_SECONDS, EngineCore, EngineError
from dsv4.engine.llm import LLM
from dsv4.engine.outputs import ProgressEvent, TokenEvent
from dsv4.engine.progress import ProgressWatch
from dsv4.engine.request import Request
from dsv4.engine.sampling_params import SamplingParams
from dsv4.engine.waiting import WaitingRoom

logger = logging.getLogger("dsv4.engine")

Item = TokenEvent | ProgressEvent | EngineError


@dataclass
class _Listener:
    """Where a request's events go. `loop` is the event loop that its client runs on."""

    queue: asyncio.Queue[Item]
    loop: asyncio.AbstractEventLoop

    def send(self, item: Item) -> None:
        self.loop.call_soon_threadsafe(self.queue.put_nowait, item)


class AsyncEngine:
    """Takes an LLM over and steps it in a thread until `close`; the LLM itself refuses calls meanwhile."""

    def __init__(self, llm: LLM) -> None:
        llm.claim()
        self.llm = llm
        self.error: BaseException | None = None
        self._core: EngineCore = llm.core
        self._room = WaitingRoom(llm.engine_config)
        self._listeners: dict[int, _Listener] = {}
        self._watch = ProgressWatch()
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

    def stream(self, prompt_token_ids: list[int], params: SamplingParams) -> AsyncGenerator[TokenEvent, None]:
        """Yields the request's events; closing or dropping the generator stops the request.

        Raises ValueError at once for a prompt that cannot run, and QueueFullError where too many wait: the request
        has its place in the queue from now on, and is queued when iteration begins. If the engine stops, iteration
        raises EngineError. Safe from any thread.
        """
        events = self._events(self._new_request(prompt_token_ids, params), watched=False)
        return cast(AsyncGenerator[TokenEvent, None], events)

    def stream_with_progress(
        self, prompt_token_ids: list[int], params: SamplingParams
    ) -> AsyncGenerator[TokenEvent | ProgressEvent, None]:
        """As `stream`, with ProgressEvents before the first token.

        The first comes at once, the last with the first token, and those between several times a second at most.
        """
        return self._events(self._new_request(prompt_token_ids, params), watched=True)

    def check_room(self) -> None:
        """Raises QueueFullError where a request of any length would get it: before its prompt is even made."""
        self._room.check()

    def check(self) -> None:
        """Raises EngineError unless the engine runs."""
        with self._wake:
            self._raise_if_stopped()

    def close(self) -> None:
        """Stops the thread and gives the LLM back; requests still running get EngineError. Closing twice is closing."""
        with self._wake:
            was_closed, self._closed = self._closed, True
            self._wake.notify()
        self._thread.join()
        if not was_closed:
            self.llm.release()

    def _new_request(self, prompt_token_ids: list[int], params: SamplingParams) -> Request:
        """A checked request with a place in the queue."""
        request = self._core.new_request(prompt_token_ids, params)
        self._room.add(request)
        return request

    async def _events(self, request: Request, watched: bool) -> AsyncGenerator[TokenEvent | ProgressEvent, None]:
        listener = _Listener(asyncio.Queue(), asyncio.get_running_loop())
        if watched:  # now, not after the step that runs: it may take seconds
            listener.queue.put_nowait(request.progress(time.monotonic(), self.num_waiting))
        self._submit(lambda: self._start(request, listener, watched))
        finished = False
        try:
            while not finished:
                item = await listener.queue.get()
                if isinstance(item, EngineError):
                    finished = True
                    raise item
                finished = isinstance(item, TokenEvent) and item.finish_reason is not None
                yield item
        finally:
            if not finished:
                with contextlib.suppress(EngineError):  # an engine that has stopped runs nothing to abort
                    self._submit(lambda: self._abort(request))

    def _submit(self, command: Callable[[], None]) -> None:
        """Hands a command to the engine thread, which carries it out between two steps."""
        with self._wake:
            self._raise_if_stopped()
            self._commands.append(command)
            self._wake.notify()

    def _raise_if_stopped(self) -> None:
        if self.error is not None:
            raise EngineError(f"the engine has failed: {self.error}") from self.error
        if self._closed:
            raise EngineError("the engine is closed")

    # From here on: the engine thread.

    def _run(self) -> None:
        try:
            while (commands := self._next_commands()) is not None:
                for command in commands:
                    command()
                self._core.check_files()
                events = self._core.step()
                for request, progress in self._watch.reports(self._core.scheduler.waiting, time.monotonic()):
                    self._deliver(request, progress)
                for request, event in events:
                    self._deliver(request, event)
        except BaseException as error:  # every waiting client has to learn of it
            logger.error("the engine has stopped: %s: %s", type(error).__name__, error)
            with self._wake:
                self.error = error
        self._fail_listeners()

    def _next_commands(self) -> list[Callable[[], None]] | None:
        """Waits until there is something to do, if only a look at the files. None: the engine is closed."""
        with self._wake:
            self._wake.wait_for(lambda: self._closed or self._commands or self._core.has_work, CHECK_SECONDS)
            if self._closed:
                return None
            commands, self._commands = self._commands, []
            return commands

    def _start(self, request: Request, listener: _Listener, watched: bool) -> None:
        self._listeners[request.request_id] = listener
        if watched:
            self._watch.add(request)
        self._core.add(request)

    def _abort(self, request: Request) -> None:
        self._listeners.pop(request.request_id, None)
        self._watch.discard(request)
        self._core.abort(request)

    def _deliver(self, request: Request, event: TokenEvent | ProgressEvent) -> None:
        listener = self._listeners.get(request.request_id)
        if listener is None:  # aborted when the event before this one could not be delivered
            return
        try:
            listener.send(event)
        except RuntimeError:  # the client's event loop is closed: nobody is left to read this request
            self._abort(request)
        if isinstance(event, TokenEvent) and event.finish_reason is not None:
            self._listeners.pop(request.request_id, None)

    def _fail_listeners(self) -> None:
        message = f"the engine has failed: {self.error}" if self.error is not None else "the engine is closed"
        with self._wake:
            commands, self._commands = self._commands, []
        for command in commands:  # requests that were handed over too late still get an answer
            command()
        for listener in self._listeners.values():
            if not listener.loop.is_closed():
                listener.send(EngineError(message))
        self._listeners.clear()
        self._core.abort_all()  # the LLM's next user must not go on computing them
