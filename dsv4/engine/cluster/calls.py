"""Call: one request at a replica, from the server's side."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import weakref
from collections.abc import Callable
from typing import Any

from dsv4.engine.cluster.library import ray_module
from dsv4.engine.cluster.messages import RETRY_SECONDS, Events
from dsv4.engine.errors import EngineCrashedError, EngineError
from dsv4.engine.listeners import is_last
from dsv4.engine.outputs import TokenEvent
from dsv4.engine.process.messages import unpack
from dsv4.engine.process.portable_errors import PortableError
from dsv4.engine.process.suspects import Flight

logger = logging.getLogger("dsv4.engine")


class Call:
    """One request at a replica, in Ray Serve's `response`, whose answers are read in the loop of the engine.

    It is stopped when it is dropped. `begin` runs in that loop; all else is safe from any thread.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        response: Any,
        note: Callable[[Events], None],
        on_crash: Callable[[str], None],
    ) -> None:
        """`note`: gets every answer with events. `on_crash`: gets the name of a replica that has crashed while it
        computed the request, before the request gets its error."""
        self.replica = ""  # that has taken it
        self._loop = loop
        self._response = response
        self._note = note
        self._on_crash = on_crash
        self._listener: Flight | None = None
        self._stop = weakref.finalize(self, _cancel, loop, response)
        self._stop.atexit = False

    async def begin(self) -> None:
        """Waits until a replica has taken the request; raises its errors."""
        first = await _next(self._response)
        if isinstance(first, PortableError):
            self._stop.detach()
            raise first.error()
        self.replica = first.replica
        self._note(first)

    def read(self, listener: Flight) -> None:
        """Sends the request's events to a listener from now on."""
        self._listener = listener
        listener.replica = self.replica
        asyncio.run_coroutine_threadsafe(_pump(self._response, listener, self._note, self._on_crash), self._loop)

    def fail(self, error: EngineError) -> None:
        """Ends the request with an error."""
        listener = self._listener
        if listener is not None:
            with contextlib.suppress(RuntimeError):  # nobody reads it
                listener.send(error)
        self._stop()

    def release(self, finished: bool) -> None:
        """Stops the request unless it has finished."""
        if finished:
            self._stop.detach()
        else:
            self._stop()


async def _pump(
    response: Any, listener: Flight, note: Callable[[Events], None], on_crash: Callable[[str], None]
) -> None:
    """Sends events of a response to a listener until one ends the request. Holds no Call: one that is dropped stops."""
    with contextlib.suppress(RuntimeError):  # the client's event loop is closed: nobody reads the request
        finished = False
        while not finished:
            try:
                answer = await _next(response)
                if isinstance(answer, PortableError):
                    raise answer.error()
            except EngineError as error:
                if is_death(error):
                    on_crash(listener.replica)
                listener.send(error)
                return
            note(answer)
            for event in map(unpack, answer.events):
                finished = is_last(event)
                if isinstance(event, TokenEvent):
                    listener.count(len(event.token_ids), ended=finished)
                listener.send(event)
        return
    response.cancel()


async def _next(response: Any) -> Events | PortableError:
    """The next answer of a response. EngineCrashedError where there is none, as Ray's errors are of many kinds;
    EngineError for a request that was stopped."""
    try:
        return await anext(response)
    except asyncio.CancelledError:
        raise
    except Exception as error:
        if response.cancelled():
            raise EngineError("the request was stopped") from error
        raise crash(error) from error


def crash(error: BaseException) -> EngineCrashedError:
    """The error of a request whose replica has died. Ray's own text is long, and goes to the log."""
    logger.warning("a request has lost its replica: %s: %s", type(error).__name__, error)
    return EngineCrashedError("the engine process of a replica has ended; it is started again", RETRY_SECONDS)


def is_death(error: EngineError) -> bool:
    """True for the error of a request whose replica has died, or said that it will: not of one that is out of reach."""
    cause = error.__cause__
    died = ray_module("ray.exceptions").ActorDiedError
    return isinstance(error, EngineCrashedError) and (cause is None or isinstance(cause, died))


def _cancel(loop: asyncio.AbstractEventLoop, response: Any) -> None:
    """Stops a request at its replica. Takes no lock: finalizers call it anywhere."""
    with contextlib.suppress(RuntimeError):  # the engine is closed
        loop.call_soon_threadsafe(response.cancel)
