"""Control group (version 2) of a sandbox, where this process may make one with memory and pids controllers.

Elsewhere resource limits per process, and the supervisor's samples of all processes, hold the same limits.
"""

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


class ControlGroup:
    def __init__(self, path: Path, limits: Limits) -> None:
        self.path = path
        path.mkdir()
        self.limit(limits)

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
        return None if parent is None else cls(parent / f"dsv4-sandbox-{secrets.token_hex(8)}", limits)

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
