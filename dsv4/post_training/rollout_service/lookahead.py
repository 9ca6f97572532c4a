"""Problems that are asked ahead of the step that learns from them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Lookahead(Generic[T]):
    """Answers to problems from number `first` on, each asked in a thread that waits for it.

    They are taken in the order in which they were asked, so that long answers come into the same step as short ones of
    their time: whoever took the first that are ready would learn from short ones more often.
    """

    def __init__(self, first: int, threads: int) -> None:
        self._next = first
        self._asked: deque[Future[T]] = deque()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="dsv4-ask")

    def fill(self, count: int, ask: Callable[[int], Callable[[], T]]) -> None:
        """Ask until `count` are asked and not taken. `ask(number)` prepares a call here, which runs in a thread."""
        while len(self._asked) < count:
            self._asked.append(self._pool.submit(ask(self._next)))
            self._next += 1

    def take(self, count: int) -> list[T]:
        """The next `count` answers; waits for them."""
        return [self._asked.popleft().result() for _ in range(count)]

    def close(self) -> None:
        """Ask no more; calls that run end by themselves."""
        self._pool.shutdown(wait=False, cancel_futures=True)
