"""Limits of a sandbox."""

from dataclasses import dataclass, fields

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Limits:
    """Upper bounds of one command, and of the file tree that commands of one sandbox share."""

    wall_seconds: float = 10.0
    processor_seconds: float = 10.0  # of all processes together
    memory_bytes: int = 512 * MIB  # of all processes together, without the file tree
    processes: int = 64  # threads count as processes
    disk_bytes: int = 64 * MIB  # of the file tree: /work, /tmp and /dev/shm together
    disk_files: int = 4096
    output_bytes: int = MIB  # kept per stream; sixteen times as much in all ends the command
    open_files: int = 256  # per process

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise ValueError(f"{field.name} is {value}; a limit is above 0")
