"""Samples of what a command's processes use, from /proc."""

import os
from dataclasses import dataclass

TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(slots=True)
class Sample:
    processes: int = 0  # threads included
    processor_seconds: float = 0.0
    memory_bytes: int = 0


def pids() -> set[int]:
    return {int(name) for name in os.listdir("/proc") if name.isdigit()}


def sample(trusted: set[int], reaper: int, limit: int) -> Sample:
    """Use by all processes but `trusted`, and by those that `reaper` has reaped.

    Memory that processes share is counted once where the sum without sharing is above `limit`.
    """
    found = Sample(processor_seconds=_processor(reaper, children_only=True))
    others = pids() - trusted
    for pid in others:
        found.processor_seconds += _processor(pid, children_only=False)
        threads, memory = _status(pid)
        found.processes += threads
        found.memory_bytes += memory
    if found.memory_bytes > limit:
        found.memory_bytes = sum(_proportional(pid) for pid in others)
    return found


def _processor(pid: int, children_only: bool) -> float:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            values = file.read().rpartition(b")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, values[13:15] if children_only else values[11:15])) / TICKS


def _status(pid: int) -> tuple[int, int]:
    """Threads, and bytes of memory that no file on disk backs."""
    threads = memory = 0
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            for line in file:
                if line.startswith((b"RssAnon", b"RssShmem", b"VmPTE")):
                    memory += int(line.split()[1]) * 1024
                elif line.startswith(b"Threads"):
                    threads = int(line.split()[1])
    except OSError:
        pass
    return threads, memory


def _proportional(pid: int) -> int:
    """Memory with each shared page divided among its users; without that, memory as if nothing were shared."""
    total = 0
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
            for line in file:
                if line.startswith((b"Pss_Anon", b"Pss_Shmem")):
                    total += int(line.split()[1]) * 1024
        return total
    except OSError:
        return _status(pid)[1]
