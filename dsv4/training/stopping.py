"""SIGTERM: a run ends after the step in progress, with its state saved, and says so by its exit status."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

EXIT_STATUS = 128 + signal.SIGTERM  # as of a process that the signal ended, so that schedulers start it again


class RunStoppedError(Exception):
    """A run was asked to stop, and its state is saved."""


class StopOnSigterm:
    """Notes SIGTERM in `requested` instead of ending the process. Use as a context manager.

    A second SIGTERM ends the process at once. Outside the main thread, where Python has no signal handlers, nothing is
    noted.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: Any = None

    def __enter__(self) -> StopOnSigterm:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
