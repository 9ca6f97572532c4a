"""Warnings shown once per process, about parts of a model folder that were ignored or left unread."""

from __future__ import annotations

import logging

# If logging is not configured, Python shows warnings on stderr.
logger = logging.getLogger("dsv4")
_told: set[str] = set()


def warn_once(line: str) -> None:
    """Log `line` as a warning, the first time in this process only."""
    if line not in _told:
        _told.add(line)
        logger.warning("%s", line)
