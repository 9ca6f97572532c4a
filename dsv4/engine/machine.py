"""Memory available to this process: of the machine, within the limits of its cgroup, and of a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Memory:
    """Available and total bytes, and their owner."""

    available: int
    total: int
    owner: str  # "this machine", "the cgroup limit of this process", "cuda:0"


def host_memory(root: Path = Path("/")) -> Memory | None:
    """Memory that a process can take without swapping; None if the system has no /proc. `root`: for tests.

    The page cache counts as available, since the system reclaims it. The limit of the process's cgroup (version 1 or
    2) or of a parent group may leave less than the machine has.
    """
    return min(_memories(root), key=lambda memory: memory.available, default=None)


def memory_limit(root: Path = Path("/")) -> int | None:
    """Bytes that a process may ever have: the machine's, or the least limit of its cgroups; None without /proc."""
    found = _memories(root)
    return min(memory.total for memory in found) if found else None


def cuda_memory(device: str) -> Memory:
    """Free memory of a CUDA device; memory held by other processes is not free."""
    import torch

    free, total = torch.cuda.mem_get_info(torch.device(device))
    return Memory(free, total, device)


def _memories(root: Path) -> list[Memory]:
    """Memory of the machine and of each cgroup with a limit; none without /proc."""
    try:
        rows = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return []
    sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in (row.partition(":") for row in rows) if rest}
    found = [Memory(sizes.get("MemAvailable", sizes["MemFree"]), sizes["MemTotal"], "this machine")]
    return found + [group for folder in _cgroups(root) if (group := _cgroup_memory(folder)) is not None]


def _cgroups(root: Path) -> list[Path]:
    """Folders of the process's memory cgroup and its parents; inside a container the path may be cut off."""
    try:
        rows = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    folders: list[Path] = []
    for row in rows:
        _, controllers, path = row.split(":", 2)
        if controllers == "":
            mount = root / "sys/fs/cgroup"
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
        else:
            continue
        group = mount / path.lstrip("/")
        folders += [folder for folder in (group, *group.parents) if folder == mount or mount in folder.parents]
    return folders


def _cgroup_memory(folder: Path) -> Memory | None:
    """Memory left in one cgroup; None if it has no limit."""
    for limit_name, usage_name, cached in (
        ("memory.max", "memory.current", ("active_file", "inactive_file")),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")),
    ):
        limit, usage = _number(folder / limit_name), _number(folder / usage_name)
        if limit is None or usage is None or limit >= 1 << 60:  # version 1 writes a huge number for no limit
            continue
        left = limit - usage + sum(_statistics(folder / "memory.stat").get(name, 0) for name in cached)
        return Memory(max(0, min(left, limit)), limit, "the cgroup limit of this process")
    return None


def _number(file: Path) -> int | None:
    """The number in a file; None for a missing file or for "max"."""
    try:
        text = file.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _statistics(file: Path) -> dict[str, int]:
    try:
        rows = file.read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    return {row.split()[0]: int(row.split()[1]) for row in rows if len(row.split()) == 2}
