"""Files in memory: resident pages of mapped ones, in this process and in the page cache; reading and dropping."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
from pathlib import Path

import numpy as np

_ENTRY = 8  # bytes per page in pagemap
_PRESENT = np.uint64(1 << 63)


def resident_bytes(rows: np.ndarray) -> tuple[int, int]:
    """(bytes mapped into this process, bytes in the page cache) of pages, as rows of `ExpertMemory.rows`.

    From /proc/self/pagemap and from mincore.
    """
    first = rows[:, 2] // mmap.PAGESIZE
    pages = np.unique(
        np.concatenate([np.arange(f, f + n) for f, n in zip(first, rows[:, 3] // mmap.PAGESIZE, strict=True)])
    )
    starts = np.flatnonzero(np.diff(pages, prepend=-2) != 1)
    mapped = cached = 0
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        for part in np.split(pages, starts[1:]):
            place, count = int(part[0]), len(part)
            bits = np.frombuffer(os.pread(pagemap.fileno(), count * _ENTRY, place * _ENTRY), dtype=np.uint64)
            mapped += int(np.count_nonzero(bits & _PRESENT))
            vector = (ctypes.c_ubyte * count)()
            if libc.mincore(ctypes.c_void_p(place * mmap.PAGESIZE), ctypes.c_size_t(count * mmap.PAGESIZE), vector):
                raise OSError(ctypes.get_errno(), "mincore")
            cached += int(np.count_nonzero(np.frombuffer(bytes(vector), dtype=np.uint8) & 1))
    return mapped * mmap.PAGESIZE, cached * mmap.PAGESIZE


def read_files(folder: Path, piece: int, limit: float = math.inf) -> int:
    """Read a folder's weights in order, `piece` bytes at a time, up to `limit` bytes or so; returns the bytes read."""
    buffer, done = bytearray(piece), 0
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb", buffering=0) as handle:
            while done < limit and (count := handle.readinto(buffer)):
                done += count
    return done


def drop_files(folder: Path) -> None:
    """Take a folder's weights out of the page cache."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
