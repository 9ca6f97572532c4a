"""Reader: loads prefixes from the disk in threads, while the engine computes."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from dsv4.cache.disk.disk_cache import DiskCache, DiskMatch, LoadedPrefix

WAIT_SECONDS = 10.0  # for a disk that does not answer
LEAST_BYTES_PER_SECOND = 20e6  # that a disk is given time for


@dataclass(eq=False)
class Reading:
    """A prefix that is being read, its blocks from number `first` on."""

    match: DiskMatch
    first: int
    deadline: float  # time.monotonic() up to which it is waited for
    done: bool = False
    loaded: LoadedPrefix | None = None  # when done; None: it was gone or damaged
    cancelled: bool = False


class Reader:
    """Reads prefixes of a disk cache one after the other. One thread calls it."""

    def __init__(self, disk: DiskCache) -> None:
        self.disk = disk
        self._turn = threading.Lock()  # of the disk
        self._arrived = threading.Event()
        self._deadline = 0.0  # of the last reading
        self._current: Reading | None = None  # that has its turn

    def start(self, match: DiskMatch, first: int) -> Reading:
        """Begin to read; one that is done, with nothing loaded, while the disk does not answer an earlier one."""
        if (current := self._current) is not None and time.monotonic() > current.deadline:
            return Reading(match, first, current.deadline, done=True)
        num_bytes = (match.num_blocks + 1 - first) * self.disk.cache.page_bytes
        seconds = WAIT_SECONDS + num_bytes / LEAST_BYTES_PER_SECOND
        self._deadline = max(time.monotonic(), self._deadline - WAIT_SECONDS) + seconds
        reading = Reading(match, first, self._deadline)
        # A thread of its own, and none that the end of the process waits for: a disk may never answer.
        threading.Thread(target=self._read, args=(reading,), name="dsv4-disk-read", daemon=True).start()
        return reading

    def wait(self, seconds: float) -> None:
        """Wait until a prefix has been read since the last call, or until the time is over."""
        self._arrived.wait(seconds)
        self._arrived.clear()

    def _read(self, reading: Reading) -> None:
        try:
            with self._turn:
                self._current = reading
                try:
                    loaded = None if reading.cancelled else self.disk.load(reading.match, reading.first)
                finally:
                    self._current = None
            if not reading.cancelled:
                reading.loaded = loaded
        finally:
            reading.done = True
            self._arrived.set()
