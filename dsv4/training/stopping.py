"""SIGTERM and Ctrl-C: a run ends after the step in progress, with its state saved, and says so by its exit status."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

_NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}


class RunStoppedError(Exception):
    """A run was asked to stop, and its state is saved. `status`: of the process, as if the signal had ended it, so
    that schedulers start it again."""

    def __init__(self, message: str, status: int = 128 + signal.SIGTERM) -> None:
        super().__init__(message)
        self.status = status


class StopOnSignal:
    """Notes SIGTERM or Ctrl-C in `requested` instead of ending the process. Use as a context manager.

    A second one ends the process at once, or changes nothing if `ends_at_second` is False, which holds for SIGTERM also
    while an error of the block ends the process. Outside the main thread, where Python has no signal handlers, nothing
    is noted. `reason` is the first signal's name; on a rank that did not get it itself, SIGTERM.
    """

    def __init__(self, ends_at_second: bool = True) -> None:
        self.requested = False
        self._ends_at_second = ends_at_second
        self._first: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    @property
    def reason(self) -> str:
        return _NAMES[self._number]

    @property
    def _number(self) -> signal.Signals:
        return self._first or signal.SIGTERM

    def error(self, step: int, steps: int, place: object) -> RunStoppedError:
        """The error that ends a run which was stopped after `step` of `steps`, with its state in `place`."""
        text = f"stopped by {self.reason} after step {step} of {steps}; the state is saved in {place}"
        return RunStoppedError(text, 128 + self._number)

    def __enter__(self) -> StopOnSignal:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _NAMES}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._before and error is not None and not self._ends_at_second:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._first is not None:
            return
        self.requested, self._first = True, signal.Signals(number)
        if self._ends_at_second:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if number == signal.SIGINT:
            then = "; once more ends at once" if self._ends_at_second else ""
            print(f"\nCtrl-C: ending after the step in progress{then}", file=sys.stderr, flush=True)
