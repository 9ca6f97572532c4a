"""Memory of a training process: settings of glibc's allocator, which PyTorch takes tensors from on a CPU."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping

_MXFAST, _TRIM_THRESHOLD, _MMAP_THRESHOLD = 1, -1, -3  # glibc's M_MXFAST, M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
_MOST = 2**31 - 1
TUNABLES = "GLIBC_TUNABLES"
_CACHED_BLOCKS = "glibc.malloc.tcache_count"


def keep_freed_memory() -> bool:
    """Let the C library keep what is freed, for the next step; True if it does, which only glibc knows.

    By default large tensors go back to the system, and a step, which needs the same ones again, spends a tenth of its
    time on fresh pages. The process then never shrinks below its peak. Small blocks are merged with their neighbors at
    once: see `merging_blocks`.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    settings = {_TRIM_THRESHOLD: _MOST, _MMAP_THRESHOLD: _MOST, _MXFAST: 0}
    return mallopt is not None and all(mallopt(name, value) == 1 for name, value in settings.items())


def merging_blocks(environment: Mapping[str, str]) -> dict[str, str] | None:
    """The environment in which glibc keeps no small blocks apart (tcache); None if it is so, or says how many itself.

    A tensor is aligned to 64 bytes, so it is cut from a larger block, and the two small pieces beside it are kept for
    small objects. With one of them gone, the hole that the tensor leaves is too small for the next tensor of its size.
    """
    tunables = environment.get(TUNABLES, "")
    if _CACHED_BLOCKS in tunables:
        return None
    return {**environment, TUNABLES: f"{tunables}:{_CACHED_BLOCKS}=0".lstrip(":")}


def restart_merging_blocks() -> None:
    """Start this process anew with `merging_blocks`, which glibc reads as a process begins. On glibc alone."""
    environment = merging_blocks(os.environ)
    if environment is not None and "CS_GNU_LIBC_VERSION" in getattr(os, "confstr_names", {}):
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, sys.orig_argv, environment)
