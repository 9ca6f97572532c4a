"""Memory of a training process."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
_MOST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let the C library keep what is freed, for the next step; True if it does, which only glibc knows.

    By default large tensors go back to the system, and a step, which needs the same ones again, spends a tenth of its
    time on fresh pages. The process then never shrinks below its peak.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(name, _MOST) == 1 for name in (_TRIM_THRESHOLD, _MMAP_THRESHOLD))
