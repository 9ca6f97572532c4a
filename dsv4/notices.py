"""Lines that a user should read once: what of a model folder was ignored or left unread."""

from __future__ import annotations

import logging

# Where nobody has set logging up, Python shows warnings on stderr.
logger = logging.getLogger("dsv4")
_told: set[str] = set()


def warn_once(line: str) -> None:
    """Log one line as a warning, the first time that it comes up in this process."""
    if line not in _told:
        _told.add(line)
        logger.warning("%s", line)
