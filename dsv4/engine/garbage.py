"""Garbage collection of a process that serves: what it has loaded stays, and is not looked through again and again."""

from __future__ import annotations

import gc

_YOUNG_OBJECTS = 20_000  # between two collections; Python's 700 are those of a few tokens


def keep_what_is_loaded() -> None:
    """Exempts all present objects, those of imported modules first of all, from collection, and collects less often.

    Collections took a sixth of a server's time: each token makes objects that are counted, hardly any are in cycles.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS, 10, 10)
