"""Control group (version 2) of a sandbox, where this process may make one with memory and pids controllers.

Elsewhere resource limits per process, and the supervisor's samples of all processes, hold the same limits.
"""

import contextlib
import os
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from dsv4.post_training.sandbox.limits import MIB, Limits

MOUNT = Path("/sys/fs/cgroup")
NEEDED = {"memory", "pids"}
OWN_MEMORY = 64 * MIB  # of supervisor, launcher and bubblewrap
OWN_PROCESSES = 8
MACHINE_MEMORY, MACHINE_THREADS = 256 * MIB, 64  # of the hypervisor itself
PERIOD = 100_000  # microseconds
PREFIX = "dsv4-sandbox-"  # of a group's name; its owner's number and start follow


def delegated(mount: Path = MOUNT, membership: Path = Path("/proc/self/cgroup")) -> Path | None:
    """Nearest group at or above this process's that gives its children the needed controllers and is writable."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return None
    own = next((line[3:] for line in lines if line.startswith("0::")), None)
    if own is None or not (mount / "cgroup.controllers").exists():
        return None
    group = mount / own.strip("/")
    for folder in (group, *group.parents):
        try:
            given = set((folder / "cgroup.subtree_control").read_text().split())
        except OSError:
            return None
        if given >= NEEDED and os.access(folder, os.W_OK) and os.access(folder / "cgroup.procs", os.W_OK):
            return folder
        if folder == mount:
            return None
    return None


def _started(pid: int | str) -> str | None:
    """Start of a process, in ticks since the machine's; None where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None


def _prefix() -> str:
    """Beginning of the names of groups whose owners have their numbers in this namespace of processes."""
    return f"{PREFIX}{os.stat('/proc/self/ns/pid').st_ino}-"


def _sweep(parent: Path) -> None:
    """Remove groups of owners that were killed. One whose processes are still ending is left for the next time."""
    for path in parent.glob(f"{_prefix()}*-*-*"):
        pid, start = path.name.removeprefix(_prefix()).split("-")[:2]
        if _started(pid) != start:
            with contextlib.suppress(OSError):
                path.rmdir()


class ControlGroup:
    def __init__(self, path: Path, limits: Limits) -> None:
        self.path = path
        path.mkdir()
        try:
            self.limit(limits)
        except BaseException:
            path.rmdir()
            raise

    def limit(self, limits: Limits) -> None:
        # The file tree's pages are charged as memory too; its own mount limits them.
        memory = limits.memory_bytes + limits.disk_bytes + OWN_MEMORY
        self._write("memory.max", memory)
        self._write("memory.swap.max", 0)
        self._write("pids.max", limits.processes + OWN_PROCESSES)
        cores = max(1.0, limits.processor_seconds / limits.wall_seconds)
        self._write("cpu.max", f"{int(cores * PERIOD)} {PERIOD}")

    def limit_machine(self, memory_bytes: int) -> None:
        """Limits of a virtual machine with so much memory: its threads are not the command's processes."""
        self._write("memory.max", memory_bytes + MACHINE_MEMORY)
        self._write("pids.max", MACHINE_THREADS)

    @classmethod
    def make(cls, limits: Limits, parent: Path | None = None) -> Self | None:
        parent = parent or delegated()
        if parent is None:
            return None
        _sweep(parent)
        owner = os.getpid()
        return cls(parent / f"{_prefix()}{owner}-{_started(owner)}-{secrets.token_hex(8)}", limits)

    def _write(self, name: str, value: int | str) -> None:
        if (self.path / name).exists():  # swap and cpu may have no controller
            (self.path / name).write_text(str(value))

    def entering(self, command: Sequence[str]) -> list[str]:
        """Command that joins the group before it becomes the given one."""
        return ["sh", "-c", 'echo $$ >"$0" && exec "$@"', str(self.path / "cgroup.procs"), *command]

    def events(self) -> dict[str, int]:
        """Counts of processes ended for memory, and of forks refused."""
        counts: dict[str, int] = {}
        for file, key in (("memory.events", "oom_kill"), ("pids.events", "max")):
            for line in (self.path / file).read_text().splitlines():
                name, value = line.split()
                if name == key:
                    counts[file] = int(value)
        return counts

    def amend(self, outcome: dict[str, Any], before: dict[str, int]) -> None:
        """Add to a command's outcome what the group saw since `before`."""
        amend(outcome, before, self.events())

    def remove(self) -> None:
        """End what still runs in the group, and remove it."""
        if (self.path / "cgroup.kill").exists():
            (self.path / "cgroup.kill").write_text("1")
        for _ in range(100):
            try:
                self.path.rmdir()
                return
            except OSError:
                time.sleep(0.02)


def amend(outcome: dict[str, Any], before: dict[str, int], now: dict[str, int]) -> None:
    """Add to a command's outcome what a group saw between two counts of its events."""
    reached = set(outcome["reached"])
    if now.get("memory.events", 0) > before.get("memory.events", 0):
        reached.add("memory_bytes")
        outcome["killed_by"] = outcome["killed_by"] or ("memory" if outcome["signal"] else None)
    if now.get("pids.events", 0) > before.get("pids.events", 0):
        reached.add("processes")
    outcome["reached"] = sorted(reached)
