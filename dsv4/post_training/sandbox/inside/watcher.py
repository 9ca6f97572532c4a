"""Samples of what a command's processes use, from /proc."""

import os
from dataclasses import dataclass

TICKS = os.sysconf("SC_CLK_TCK")
WANTED = {b"Threads", b"RssAnon", b"RssShmem", b"VmPTE", b"Pss_Anon", b"Pss_Shmem"}


@dataclass(slots=True)
class Sample:
    processes: int = 0  # threads included
    processor_seconds: float = 0.0
    memory_bytes: int = 0


def pids() -> set[int]:
    return {int(name) for name in os.listdir("/proc") if name.isdigit()}


class Watcher:
    """Samples of the use by all processes but `trusted`, and by those of them that have ended.

    `reaper`: the process that waits for orphans. Memory that processes share is counted once where the sum without
    sharing is above `limit`.
    """

    def __init__(self, trusted: set[int], reaper: int, limit: int) -> None:
        self._trusted, self._reaper, self._limit = trusted, reaper, limit
        self._own: dict[tuple[int, int], int] = {}  # (process, its start) -> ticks of its own, at the last sample
        self._ended = 0  # ticks of their own of processes that are gone

    def sample(self) -> Sample:
        found = Sample()
        own: dict[tuple[int, int], int] = {}
        holders: list[int] = []
        waited_for = _times(self._reaper)[2]
        for pid in pids() - self._trusted:
            start, ticks, of_children = _times(pid)
            if start:
                own[pid, start] = ticks
                waited_for += of_children
            threads, memory, holder = _status(pid)
            found.processes += threads
            found.memory_bytes += memory
            holders.append(holder)
        self._ended += sum(ticks for process, ticks in self._own.items() if process not in own)
        self._own = own
        # Whoever waits for a process takes over its time; nobody has that of children of one that ignores SIGCHLD.
        found.processor_seconds = (sum(own.values()) + max(waited_for, self._ended)) / TICKS
        if found.memory_bytes > self._limit:
            found.memory_bytes = sum(map(_proportional, holders))
        return found


def _times(pid: int) -> tuple[int, int, int]:
    """Start of a process, its own ticks, and those of children that were waited for; zeros where it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            values = file.read().rpartition(b")")[2].split()
    except OSError:
        return 0, 0, 0
    return int(values[19]), int(values[11]) + int(values[12]), int(values[13]) + int(values[14])


def _status(pid: int) -> tuple[int, int, int]:
    """Threads, bytes of memory that no file on disk backs, and a thread that has it: the first may have ended alone."""
    found = _numbers(f"/proc/{pid}/status")
    threads = found.get("Threads", 0)
    if "RssAnon" not in found and threads > 1:
        for thread in _threads(pid):
            of_thread = _numbers(f"/proc/{thread}/status")
            if "RssAnon" in of_thread:
                return threads, _memory(of_thread), thread
    return threads, _memory(found), pid


def _proportional(thread: int) -> int:
    """Memory with each shared page divided among its users; without that, memory as if nothing were shared."""
    found, divided = _numbers(f"/proc/{thread}/status"), _numbers(f"/proc/{thread}/smaps_rollup")
    if "Pss_Anon" not in divided:
        return _memory(found)
    return (divided["Pss_Anon"] + divided.get("Pss_Shmem", 0) + found.get("VmPTE", 0)) * 1024


def _memory(found: dict[str, int]) -> int:
    return sum(found.get(name, 0) for name in ("RssAnon", "RssShmem", "VmPTE")) * 1024


def _threads(pid: int) -> list[int]:
    try:
        return [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    except OSError:
        return []


def _numbers(path: str) -> dict[str, int]:
    """Wanted lines of a file in /proc; none where the process, or its memory, is gone."""
    found: dict[str, int] = {}
    try:
        with open(path, "rb") as file:
            for line in file:
                name, _, rest = line.partition(b":")
                if name in WANTED:
                    found[name.decode()] = int(rest.split()[0])
    except OSError:
        pass
    return found
