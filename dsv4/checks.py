"""DSV4_CHECK=1: invariants that cost too much to check in every step are checked all the same. The tests set it."""

from __future__ import annotations

import os


def enabled() -> bool:
    """True if DSV4_CHECK is 1."""
    return os.environ.get("DSV4_CHECK") == "1"
