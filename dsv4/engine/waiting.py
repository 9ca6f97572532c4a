"""Bounds on the engine's waiting requests and on their prompt tokens, which take memory."""

from __future__ import annotations

import threading
import weakref

from dsv4.engine.config import EngineConfig
from dsv4.engine.errors import QueueFullError
from dsv4.engine.request import Request, RequestStatus


class WaitingRoom:
    """Set of waiting requests. A place is freed when its request runs, has finished, or is garbage-collected.

    Safe from any thread. If no request waits, a prompt of any length is admitted.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self._requests: weakref.WeakSet[Request] = weakref.WeakSet()
        self._lock = threading.Lock()

    def check(self, num_tokens: int = 0) -> None:
        """QueueFullError unless one more request, of `num_tokens` tokens, may wait."""
        with self._lock:
            self._check(num_tokens)

    def add(self, request: Request) -> None:
        """Adds a request; QueueFullError if there is no place."""
        with self._lock:
            self._check(len(request.prompt_token_ids))
            self._requests.add(request)

    def _check(self, num_tokens: int) -> None:
        if not self._requests:
            return
        begun = (RequestStatus.RUNNING, RequestStatus.FINISHED)
        waiting = [request for request in self._requests if request.status not in begun]
        self._requests = weakref.WeakSet(waiting)
        tokens, limits = sum(len(request.prompt_token_ids) for request in waiting), self.config
        full = len(waiting) >= limits.max_num_waiting or tokens + max(1, num_tokens) > limits.max_waiting_tokens
        if waiting and full:
            asked = f"; this one has {num_tokens} tokens" if num_tokens else ""
            raise QueueFullError(
                f"the queue is full: {len(waiting)} requests with {tokens} tokens are waiting, allowed are"
                f" {limits.max_num_waiting} requests with {limits.max_waiting_tokens} tokens{asked}"
            )
