"""The engine process: loads the model, runs an AsyncEngine, and carries out the messages of the server's end."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from dsv4.engine.async_engine import AsyncEngine
from dsv4.engine.errors import EngineError, QueueTimeoutError
from dsv4.engine.garbage import keep_what_is_loaded
from dsv4.engine.listeners import Item
from dsv4.engine.llm import LLM
from dsv4.engine.process.messages import (
    Close,
    CollectMetrics,
    Drop,
    EngineState,
    Events,
    Failed,
    Link,
    Load,
    LoadFailed,
    LogRecord,
    PackedEvent,
    Ready,
    Reply,
    Reserve,
    Start,
    Stopped,
    Trace,
    pack,
)
from dsv4.engine.process.portable_errors import PortableError
from dsv4.engine.process.served_model import ModelFacts
from dsv4.engine.request import Request

_COMPILING_THREADS = 2  # constraints compiled at a time
_PR_SET_PDEATHSIG = 1
_STATE_SECONDS = 0.2  # between two looks at the counts, for steps that take long
_BEAT_SECONDS = 1.0  # between two messages at most, by which the server sees that this process is alive


def main(descriptor: int, parent: int) -> None:
    """Runs the process. `descriptor`: its end of the link; `parent`: the process that it must not outlive."""
    for ignored in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C reaches the whole group: the server ends this process
        signal.signal(ignored, signal.SIG_IGN)
    _die_with(parent)
    link = Link(socket.socket(fileno=descriptor))
    load = link.receive()
    assert isinstance(load, Load)
    logging.getLogger().addHandler(_LinkHandler(link))
    logging.getLogger().setLevel(load.log_level)
    status = Worker(link).run(load)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # threads and libraries have nothing left to do


class Worker:
    """Serves one link until the server closes it, the engine fails or the server is gone."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._engine: AsyncEngine | None = None
        self._requests: dict[int, Request] = {}  # reserved or started
        self._compiling = ThreadPoolExecutor(_COMPILING_THREADS, "dsv4-compile")
        self._tracing = asyncio.new_event_loop()  # of the traces, in a thread of its own
        self._traces: dict[int, Future[None]] = {}  # that wait or run
        self._events: list[tuple[int, PackedEvent]] = []  # of the running step
        self._sending_state = threading.Lock()
        self._state = EngineState()  # as it was sent
        self._sent_at = 0.0

    def run(self, load: Load) -> int:
        """Exit status of the process."""
        reader = threading.Thread(target=self._read, name="dsv4-messages", daemon=True)
        reader.start()  # now: the server may go away while the model is loaded
        try:
            llm: LLM = load.make()
            engine = AsyncEngine(llm)
        except BaseException as error:
            self._link.send(LoadFailed(PortableError.of(error)))
            return 1
        threading.Thread(target=self._tracing.run_forever, name="dsv4-trace", daemon=True).start()
        engine.after_step = self._send_step
        self._engine = engine
        keep_what_is_loaded()
        self._link.send(Ready(ModelFacts.of(llm)))
        while not engine.join(_STATE_SECONDS):
            self._send_state()
        if engine.error is not None:
            error = engine.error
            self._link.send(Stopped(str(error) or type(error).__name__, lasting=isinstance(error, EngineError)))
            llm.close()  # what the disk is to forget is forgotten
            return 1
        llm.close()
        return 0

    def _read(self) -> None:
        try:
            while not isinstance(message := self._link.receive(), Close):
                self._handle(message)
        except (EOFError, OSError):
            os._exit(1)  # the server is gone: nobody needs what is computed
        if self._engine is None:
            os._exit(0)
        self._engine.close()

    def _handle(self, message: object) -> None:
        engine = self._engine
        assert engine is not None, "messages come after Ready"
        if isinstance(message, Start):
            request = self._requests.get(message.id)
            if request is not None:
                with contextlib.suppress(EngineError):  # Stopped tells the server
                    engine.start(request, _Sender(self, message.id), message.watched)
        elif isinstance(message, Drop):
            request = self._requests.pop(message.id, None)
            if request is not None:
                engine.abort(request, "stop" if message.complete else "abort")
            trace = self._traces.pop(message.id, None)
            if trace is not None:
                trace.cancel()
        elif isinstance(message, Reserve):
            if message.params.is_constrained:
                self._compiling.submit(self._reserve, engine, message)
            else:
                self._reserve(engine, message)
        elif isinstance(message, Trace):
            trace = asyncio.run_coroutine_threadsafe(self._trace(engine, message), self._tracing)
            self._traces[message.id] = trace
            trace.add_done_callback(lambda _: self._traces.pop(message.id, None))
        elif isinstance(message, CollectMetrics):
            self._link.send(Reply(message.id, list(engine.metrics.collect()), None, self._present_state()))

    def _reserve(self, engine: AsyncEngine, message: Reserve) -> None:
        error = None
        try:
            request = engine.reserve(list(message.prompt_token_ids), message.params, message.user)
            self._requests[message.id] = request
        except BaseException as refusal:  # whatever it is, the server's caller gets it
            error = PortableError.of(refusal)
        with contextlib.suppress(OSError):  # the server is gone, and this process ends
            self._link.send(Reply(message.id, None, error, self._present_state()))

    async def _trace(self, engine: AsyncEngine, message: Trace) -> None:
        trace, error = None, None
        try:
            trace = await engine.trace(list(message.token_ids))
        except asyncio.CancelledError:
            raise  # dropped: nobody waits for a reply
        except BaseException as refusal:  # as in _reserve
            error = PortableError.of(refusal)
        with contextlib.suppress(OSError):
            self._link.send(Reply(message.id, trace, error, self._present_state()))

    def deliver(self, request_id: int, item: Item) -> None:
        """Takes an event of a request in the engine thread, or its first progress in the reader's."""
        if isinstance(item, QueueTimeoutError):
            self._requests.pop(request_id, None)
            with contextlib.suppress(OSError):  # the server is gone, and this process ends
                self._link.send(Failed(request_id, PortableError.of(item)))
            return
        if isinstance(item, EngineError):
            return  # Stopped, or the end of the process, tells the server
        if getattr(item, "finish_reason", None) is not None:
            self._requests.pop(request_id, None)
        if threading.current_thread().name == "dsv4-engine":
            self._events.append((request_id, pack(item)))
        else:
            self._link.send(Events([(request_id, pack(item))], self._present_state()))

    def _send_step(self) -> None:
        """Sends the events of a step together, and the counts where they have changed."""
        events, self._events = self._events, []
        self._send_state(events)

    def _send_state(self, events: Sequence[tuple[int, PackedEvent]] = ()) -> None:
        with self._sending_state:
            state = self._present_state()
            now = time.monotonic()
            if events or state != self._state or now - self._sent_at > _BEAT_SECONDS:
                self._state, self._sent_at = state, now
                with contextlib.suppress(OSError):  # the server is gone, and this process ends
                    self._link.send(Events(list(events), state))

    def _present_state(self) -> EngineState:
        assert self._engine is not None
        return EngineState.of(self._engine)


class _Sender:
    """Listener of a request, known to the server by an id."""

    def __init__(self, worker: Worker, request_id: int) -> None:
        self._worker = worker
        self._id = request_id

    def send(self, item: Item) -> None:
        self._worker.deliver(self._id, item)


class _LinkHandler(logging.Handler):
    """Sends log records to the server, which writes its log."""

    def __init__(self, link: Link) -> None:
        super().__init__()
        self._link = link

    def emit(self, record: logging.LogRecord) -> None:
        fields = dict(vars(record)) | {"msg": record.getMessage(), "args": None, "exc_info": None}
        if record.exc_info:
            fields["exc_text"] = (self.formatter or logging.Formatter()).formatException(record.exc_info)
        with contextlib.suppress(Exception):  # an attribute that cannot be sent, or no server
            self._link.send(LogRecord(fields))


def _die_with(parent: int) -> None:
    """Asks the kernel to kill this process when its parent ends, however it ends. Elsewhere the link's end tells."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it has ended before
            os._exit(1)
