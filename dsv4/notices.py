"""Warnings that do not fill the log: shown once per process, or once a minute."""

from __future__ import annotations

import logging
import time

# If logging is not configured, Python shows warnings on stderr.
logger = logging.getLogger("dsv4")
_told: set[str] = set()


def warn_once(line: str) -> None:
    """Log `line` as a warning, the first time in this process only."""
    if line not in _told:
        _told.add(line)
        logger.warning("%s", line)


class SparseLog:
    """Logs a warning a minute at most, of what may happen at any rate; the rest is dropped."""

    def __init__(self, logger: logging.Logger, seconds: float = 60.0) -> None:
        self._logger, self._seconds = logger, seconds
        self._logged_at = float("-inf")

    def warn(self, line: str) -> None:
        """Logs `line` as a warning, unless another was logged less than a minute ago."""
        now = time.monotonic()
        if now - self._logged_at >= self._seconds:
            self._logged_at = now
            self._logger.warning("%s", line)
