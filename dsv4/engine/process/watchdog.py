"""Watchdog: tells an engine process that has stopped moving from one that has nothing to do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Activity:
    """Counts of a process as the server sees them."""

    num_steps: int  # that it has taken
    num_messages: int  # that have come from it
    num_requests: int  # that it has been given and has not ended
    num_calls: int  # that it has not answered


class StuckWatch:
    """Adds up the time in which a process with requests took no step, or in which one with calls sent nothing.

    It is asked once per `interval` and counts the interval, not the clock: time in which the server's own process was
    stopped is not the engine's.
    """

    def __init__(self, seconds: float) -> None:
        """`seconds`: longest time without a step."""
        self._seconds = seconds
        self.interval = min(1.0, seconds / 8)
        self._process: object = None
        self._last = Activity(0, 0, 0, 0)
        self._since_step = self._since_message = 0.0

    def verdict(self, process: object, now: Activity) -> str | None:
        """Fault of a process in words, None while there is none. Another process starts from zero."""
        last, known = self._last, process is self._process
        self._process, self._last = process, now
        stands = known and min(now.num_requests, last.num_requests) > 0 and now.num_steps == last.num_steps
        silent = known and min(now.num_calls, last.num_calls) > 0 and now.num_messages == last.num_messages
        self._since_step = self._since_step + self.interval if stands else 0.0
        self._since_message = self._since_message + self.interval if silent else 0.0
        if self._since_step >= self._seconds:
            return f"took no step for {self._seconds:g} s with {now.num_requests} requests open"
        if self._since_message >= self._seconds:
            return f"sent nothing for {self._seconds:g} s with {now.num_calls} calls open"
        return None
