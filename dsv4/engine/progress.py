"""ProgressWatch: reports the progress of watched requests through queue and prefill."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dsv4.engine.outputs import ProgressEvent
from dsv4.engine.request import Request

REPORT_SECONDS = 0.2  # least time between two reports of a request, except the last


@dataclass
class _Watched:
    request: Request
    reported: tuple[int | None, int]  # queue position and computed tokens of the latest report


class ProgressWatch:
    """Requests with progress reports, each until its first token. Not thread-safe: for the engine thread only."""

    def __init__(self) -> None:
        self._watched: dict[int, _Watched] = {}
        self._due_time = 0.0

    def add(self, request: Request) -> None:
        self._watched[request.request_id] = _Watched(request, (-1, 0))

    def discard(self, request: Request) -> None:
        self._watched.pop(request.request_id, None)

    def reports(self, waiting: Iterable[Request], now: float) -> list[tuple[Request, ProgressEvent]]:
        """Reports due after a step; `waiting` is the queue, the next request to start first.

        A request with its first token is reported a last time at once. Others are reported if REPORT_SECONDS have
        passed and their state has changed.
        """
        if not self._watched:
            return []
        is_due = now >= self._due_time
        positions: dict[int, int] = {}
        if is_due:
            self._due_time = now + REPORT_SECONDS
            positions = {request.request_id: place for place, request in enumerate(waiting)}
        events: list[tuple[Request, ProgressEvent]] = []
        for watched in list(self._watched.values()):
            request = watched.request
            is_last = request.first_token_time is not None
            if not (is_due or is_last):
                continue
            event = request.progress(now, positions.get(request.request_id))
            state = (event.queue_position, event.num_computed_tokens)
            if is_last or state != watched.reported:
                watched.reported = state
                events.append((request, event))
            if is_last:
                self.discard(request)
        return events
