"""Outcome of one command in a sandbox."""

import signal
from dataclasses import dataclass
from typing import Any, Literal

Reason = Literal["wall time", "processor time", "memory", "output", "interrupted"]


@dataclass(frozen=True, slots=True)
class Usage:
    """Resources that a command used: peaks of memory and processes are sampled, the file tree's are its state after."""

    wall_seconds: float = 0.0
    processor_seconds: float = 0.0
    memory_bytes: int = 0
    processes: int = 0
    disk_bytes: int = 0
    disk_files: int = 0


@dataclass(frozen=True, slots=True)
class Result:
    """Either `exit_code` or `signal` is set; `killed_by` names the limit for which the sandbox ended the command."""

    exit_code: int | None
    signal: int | None
    killed_by: Reason | None
    reached: tuple[str, ...]  # names of limits that the command ran into, whether it was ended for them or refused more
    stdout: bytes
    stderr: bytes
    stdout_bytes: int  # written; more than len(stdout) where output was cut
    stderr_bytes: int
    left_over: int  # background processes that were ended with the command
    usage: Usage

    @property
    def ok(self) -> bool:
        return self.exit_code == 0 and self.killed_by is None

    @property
    def text(self) -> str:
        """Standard output as text; bytes that are not UTF-8 and control characters become visible escapes."""
        return printable(self.stdout)

    def describe(self) -> str:
        """One sentence on how the command ended."""
        if self.killed_by == "interrupted":
            end = "interrupted, outcome unknown"
        elif self.killed_by is not None:
            end = f"ended by the sandbox: {self.killed_by} over its limit"
        elif self.signal is not None:
            end = f"ended by {signal.Signals(self.signal).name if self.signal < 32 else f'signal {self.signal}'}"
        else:
            end = f"exit code {self.exit_code}"
        notes = [f"limits reached: {', '.join(self.reached)}"] if self.reached else []
        if self.stdout_bytes > len(self.stdout) or self.stderr_bytes > len(self.stderr):
            notes.append(f"output cut, {self.stdout_bytes + self.stderr_bytes} bytes were written")
        if self.left_over:
            notes.append(f"{self.left_over} background processes ended with it")
        return "; ".join([end, *notes])


def printable(data: bytes) -> str:
    """Text that is safe to show in a terminal: invalid UTF-8 and control characters escaped, newline and tab kept."""
    return escaped(data.decode("utf-8", errors="backslashreplace"))


def escaped(text: str) -> str:
    """Text with its control characters and lone surrogates escaped, newline and tab kept."""
    return "".join(c if c in "\n\t" or c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def result_from(outcome: dict[str, Any], stdout: bytes, stderr: bytes) -> Result:
    """Result from the supervisor's reply, or from a record of a log."""
    return Result(
        exit_code=outcome["exit_code"],
        signal=outcome["signal"],
        killed_by=outcome["killed_by"],
        reached=tuple(outcome["reached"]),
        stdout=stdout,
        stderr=stderr,
        stdout_bytes=outcome["stdout_bytes"],
        stderr_bytes=outcome["stderr_bytes"],
        left_over=outcome["left_over"],
        usage=Usage(**outcome["usage"]),
    )
