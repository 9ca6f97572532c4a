"""Suspects: prompts that were being computed when the engine process crashed, and are not to crash it again and again.

A crash ends many requests, one of which may be its cause. Their prompts are suspects: each, if it comes again, is
computed on trial, while no other suspect is, until its answer is longer than it was at the crash; then it is cleared.
If the process crashes during a trial, the prompt on trial is the cause, and is refused from then on; so is one that was
twice the only request at a crash, however long its answers were. An innocent prompt is refused only if something else
crashes the process at those times. Prompts are known by their hash. Where several processes compute, the end of one
judges its own requests alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import threading
from array import array
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from dsv4.engine.errors import PromptRefusedError, QueueTimeoutError
from dsv4.engine.listeners import QueueListener

_MAX_PROMPTS = 4096  # suspects, and refused ones, that are remembered: the newest

logger = logging.getLogger("dsv4.engine")

V = TypeVar("V")


@dataclass(eq=False)
class Flight(QueueListener):
    """One request of the engine process, and the tokens of its answer that have come."""

    key: str = ""
    replica: str = ""  # that computes it, where there are several
    num_tokens: int = 0
    trial_tokens: int = 0  # after more than these it is cleared
    on_cleared: Callable[[], None] | None = None  # None: not on trial
    ended: bool = False  # in the process; its client may still be reading

    def count(self, tokens: int, ended: bool) -> None:
        """Counts tokens of the answer as they come, whenever the client reads them. `ended`: they are the last."""
        self.num_tokens += tokens
        self.ended = ended
        if self.on_cleared is not None and (ended or self.num_tokens > self.trial_tokens):
            self.on_cleared()


class Suspects:
    """Hashes of prompts, and the requests that run now. Safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards all below
        self._open: set[Flight] = set()
        self._suspects: OrderedDict[str, int] = OrderedDict()  # tokens that the answer had at the crash
        self._alone: OrderedDict[str, bool] = OrderedDict()  # crashed it while no other request was in flight
        self._refused: OrderedDict[str, bool] = OrderedDict()
        self._trial: Flight | None = None
        self._turns: deque[asyncio.Future[None]] = deque()  # of suspects that wait for their trial

    def check(self, key: str) -> None:
        """PromptRefusedError for the hash of a prompt that has crashed the engine twice."""
        with self._lock:
            self._check(key)

    def suspected(self, key: str) -> bool:
        """True if a prompt's request may have to wait for its trial. PromptRefusedError as `check`."""
        with self._lock:
            self._check(key)
            return key in self._suspects

    @contextlib.asynccontextmanager
    async def flight(self, key: str, seconds: float = 0.0) -> AsyncGenerator[Flight, None]:
        """Context of a request, entered once its prompt may be computed. PromptRefusedError as `check`,
        QueueTimeoutError after `seconds` of waiting; 0: no limit.
        """
        flight = Flight(asyncio.Queue(), asyncio.get_running_loop(), key)
        try:
            async with asyncio.timeout(seconds or None):
                while (turn := self._begin(flight)) is not None:
                    await turn
        except TimeoutError as error:
            raise QueueTimeoutError(f"the request waited for {seconds:g} s and was not begun") from error
        finally:
            self._wake()
        try:
            yield flight
        finally:
            self._end(flight)

    def blame(self, replica: str = "") -> None:
        """Judges the requests in flight in a replica that has crashed. Again: does nothing."""
        with self._lock:
            crashed = {flight for flight in self._open if flight.replica == replica}
            self._open -= crashed
            flights = [flight for flight in crashed if not flight.ended]
            guilty = self._trial if self._trial in crashed else None
            if guilty is None and len(flights) == 1:
                key = flights[0].key
                guilty = flights[0] if key in self._alone else None
                _remember(self._alone, key, True)
            if guilty is None:
                for flight in flights:
                    self._suspect(flight.key, flight.num_tokens)
            else:
                guilty.on_cleared = None
                self._refuse(guilty.key)
        self._wake()

    def blame_unplaced(self, key: str) -> None:
        """Judges a prompt whose replica has crashed before it was known that it had the request."""
        with self._lock:
            trial = self._trial
            if trial is not None and trial.key == key and not trial.replica:
                trial.on_cleared = None
                self._refuse(key)
            else:
                self._suspect(key, 0)
        self._wake()

    def _suspect(self, key: str, tokens: int) -> None:
        _remember(self._suspects, key, max(tokens, self._suspects.get(key, 0)))

    def _refuse(self, key: str) -> None:
        if self._trial is not None and self._trial.key == key:
            self._trial = None
        self._suspects.pop(key, None)
        _remember(self._refused, key, True)
        logger.error("prompt %s has crashed the engine twice; it is refused from now on", key)

    def _check(self, key: str) -> None:
        if key in self._refused:
            raise PromptRefusedError(
                f"this prompt (hash {key}) has crashed the engine twice and is not computed again; send another one, "
                "or have the server started anew"
            )

    def _begin(self, flight: Flight) -> asyncio.Future[None] | None:
        """Lets a request begin, on trial if its prompt is a suspect; a future to wait for while another is on trial."""
        with self._lock:
            self._check(flight.key)
            tokens = self._suspects.get(flight.key)
            if tokens is not None:
                if self._trial is not None:
                    self._turns.append(flight.loop.create_future())
                    return self._turns[-1]
                self._trial = flight
                flight.trial_tokens, flight.on_cleared = tokens, partial(self._clear, flight)
            self._open.add(flight)
        return None

    def _clear(self, flight: Flight) -> None:
        with self._lock:
            flight.on_cleared = None
            self._suspects.pop(flight.key, None)
            if self._trial is flight:
                self._trial = None
        self._wake()

    def _end(self, flight: Flight) -> None:
        with self._lock:
            self._open.discard(flight)
            flight.on_cleared = None
            if self._trial is flight:  # its client has gone before it was cleared
                self._trial = None
        self._wake()

    def _wake(self) -> None:
        """Wakes the next suspect if none is on trial; one that finds itself cleared wakes the one after it."""
        with self._lock:
            while self._turns and self._trial is None:
                turn = self._turns.popleft()
                if turn.done():  # cancelled
                    continue
                with contextlib.suppress(RuntimeError):  # its event loop is closed
                    turn.get_loop().call_soon_threadsafe(_set_done, turn)
                    return


def prompt_hash(tokens: array[int] | list[int]) -> str:
    """Hash of a prompt's token ids, as it stands in the log and in refusals."""
    data = tokens.tobytes() if isinstance(tokens, array) else repr(tokens).encode()
    return hashlib.sha256(data).hexdigest()[:16]


def _remember(known: OrderedDict[str, V], key: str, value: V) -> None:
    known[key] = value
    known.move_to_end(key)
    if len(known) > _MAX_PROMPTS:
        known.popitem(last=False)


def _set_done(turn: asyncio.Future[None]) -> None:
    if not turn.done():
        turn.set_result(None)
