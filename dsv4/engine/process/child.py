"""Child: one engine process as the server sees it, from its start to its end."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import dsv4
from dsv4.engine.errors import EngineError
from dsv4.engine.outputs import TokenEvent
from dsv4.engine.process.messages import (
    Drop,
    EngineState,
    Events,
    Failed,
    Link,
    Load,
    LoadFailed,
    LogRecord,
    Ready,
    Reply,
    Start,
    Stopped,
    unpack,
)
from dsv4.engine.process.suspects import Flight
from dsv4.engine.process.watchdog import Activity

_EXIT_SECONDS = 10.0  # from the end of the link to the end of the process
_BOOT = "from dsv4.engine.process.worker import main; main({descriptor}, {parent})"

logger = logging.getLogger("dsv4.engine")


class Child:
    """A process, the calls that wait for its answers, and the listeners of its requests.

    `read` runs in one thread; all else is safe from any.
    """

    def __init__(self, make: Callable[[], Any], ids: itertools.count[int]) -> None:
        self.state = EngineState()
        self._ids = ids
        self._num_messages = 0
        self._killed_for: str | None = None
        self._failure: EngineError | None = None
        self._lock = threading.Lock()  # guards _failure, and what is added to the next two
        self._calls: dict[int, Future[Any]] = {}
        self._listeners: dict[int, Flight] = {}
        # Reentrant, unlike a queue with a lock: a finalizer may send while this thread sends.
        self._outbox: queue.SimpleQueue[object] = queue.SimpleQueue()
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = _start(theirs.fileno())
        self._link = Link(ours)
        self.send(Load(make, logging.getLogger("dsv4").getEffectiveLevel()))
        threading.Thread(target=self._write, name="dsv4-engine-outbox", daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: object) -> None:
        """Sends a message in the background: a process that does not read blocks nobody."""
        self._outbox.put(message)

    def call(self, message: Callable[[int], object]) -> tuple[int, Future[Any]]:
        """Sends a message with a new id; the future has its answer. EngineError if the process has ended."""
        number = next(self._ids)
        future: Future[Any] = Future()
        with self._lock:
            if self._failure is not None:
                raise self._failure
            self._calls[number] = future
        self.send(message(number))
        return number, future

    def start(self, request_id: int, listener: Flight, watched: bool) -> None:
        """Starts a reserved request. EngineError if the process has ended."""
        with self._lock:
            if self._failure is not None:
                raise self._failure
            self._listeners[request_id] = listener
        self.send(Start(request_id, watched))

    def drop(self, request_id: int, complete: bool = False) -> None:
        """Stops a request or a trace, or gives a request's place back. Takes no lock: finalizers call it anywhere.

        `complete`: see Drop.
        """
        self._listeners.pop(request_id, None)
        self._calls.pop(request_id, None)
        self.send(Drop(request_id, complete))

    def forget(self, request_id: int) -> None:
        """Removes the listener of a request that has ended."""
        self._listeners.pop(request_id, None)

    def fail(self, error: EngineError) -> None:
        """Ends all calls and requests with an error; later ones get it too."""
        with self._lock:
            self._failure = error
            calls, self._calls = list(self._calls.values()), {}
            listeners, self._listeners = list(self._listeners.values()), {}
        for call in calls:
            call.set_exception(error)
        for listener in listeners:
            if not listener.loop.is_closed():
                listener.send(error)

    @property
    def activity(self) -> Activity:
        return Activity(self.state.num_steps, self._num_messages, len(self._listeners), len(self._calls))

    def kill(self, reason: str) -> None:
        """Ends the process at once. `reason`: what it did, in words that follow "the engine process"."""
        self._killed_for = reason
        self._process.kill()

    def read(self, on_loaded: Callable[[Ready | LoadFailed], None]) -> Stopped | None:
        """Handles what the process sends until it has ended; returns what it said about a failure, if anything."""
        stopped: Stopped | None = None
        try:
            while True:
                message = self._link.receive()
                self._num_messages += 1
                if isinstance(message, Events):
                    self.state = message.state
                    self._deliver(message)
                elif isinstance(message, Reply):
                    self.state = message.state
                    self._answer(message)
                elif isinstance(message, Failed):
                    self._end_request(message)
                elif isinstance(message, (Ready, LoadFailed)):
                    on_loaded(message)
                elif isinstance(message, LogRecord):
                    record = logging.makeLogRecord(message.fields)
                    if logging.getLogger(record.name).isEnabledFor(record.levelno):
                        logging.getLogger(record.name).handle(record)
                elif isinstance(message, Stopped):
                    stopped = message
        except (EOFError, OSError):
            pass
        except Exception as error:  # a process whose memory is damaged may send anything
            logger.error("the engine process has sent what cannot be read: %s: %s", type(error).__name__, error)
        self._end()
        return stopped

    def describe_end(self) -> str:
        """End of the process in words."""
        if self._killed_for is not None:
            return f"the engine process {self._killed_for} and was killed"
        status = self._process.returncode
        if status is None or status >= 0:
            return f"the engine process has ended with status {status}"
        name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
        hint = "; the system does so when memory runs out" if name == "SIGKILL" else ""
        return f"the engine process was killed by {name}{hint}"

    def _end(self) -> None:
        """Waits for the end of the process, which its link has announced; kills one that stays."""
        try:
            self._process.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._outbox.put(None)
        self._link.close()

    def _write(self) -> None:
        while (message := self._outbox.get()) is not None:
            try:
                self._link.send(message)
            except OSError:
                return  # the reader notices

    def _answer(self, reply: Reply) -> None:
        call = self._calls.pop(reply.id, None)
        if call is None:
            if reply.error is None:
                self.send(Drop(reply.id))  # nobody waits for it any more
        elif reply.error is not None:
            call.set_exception(reply.error.error())
        else:
            call.set_result(reply.value)

    def _end_request(self, message: Failed) -> None:
        flight = self._listeners.pop(message.id, None)
        error = message.error.error()
        if flight is not None and isinstance(error, EngineError):
            with contextlib.suppress(RuntimeError):  # the client's event loop is closed: nobody reads it
                flight.send(error)

    def _deliver(self, message: Events) -> None:
        """Posts events to their event loops, those of one loop together."""
        batches: dict[asyncio.AbstractEventLoop, list[tuple[Flight, Any]]] = {}
        for request_id, packed in message.events:
            listener = self._listeners.get(request_id)
            if listener is not None:
                event = unpack(packed)
                if isinstance(event, TokenEvent):
                    listener.count(len(event.token_ids), ended=event.finish_reason is not None)
                    if listener.ended:
                        self._listeners.pop(request_id, None)  # its client may take long to read the answer
                batches.setdefault(listener.loop, []).append((listener, event))
        for loop, batch in batches.items():
            try:
                loop.call_soon_threadsafe(_put, batch)
            except RuntimeError:  # the client's event loop is closed: nobody reads these requests
                for request_id, listener in list(self._listeners.items()):
                    if listener.loop is loop:
                        self.drop(request_id)


def _put(batch: list[tuple[Flight, Any]]) -> None:
    for listener, event in batch:
        listener.queue.put_nowait(event)


def _start(descriptor: int) -> subprocess.Popen[bytes]:
    """Starts a Python process that has a descriptor of this one, and this package.

    Not multiprocessing's: that imports the main module again, which starts the server again in a plain script.
    """
    paths = [str(Path(dsv4.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    code = _BOOT.format(descriptor=descriptor, parent=os.getpid())
    # -P: the folder in which the server was started is no place of modules.
    command = [sys.executable, "-P", "-c", code]
    return subprocess.Popen(command, pass_fds=[descriptor], stdin=subprocess.DEVNULL, env=environment)
