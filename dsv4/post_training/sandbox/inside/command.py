"""One command in a cell: streams, limits, end."""

import os
import selectors
import signal
import time
from typing import Any

from dsv4.post_training.sandbox.inside import frames, watcher
from dsv4.post_training.sandbox.inside.cell import FOLDERS, TREE, Cell

INTERVAL = 0.04  # seconds between samples
FLOOD = 16  # a command that writes this many times output_bytes is ended
CHUNK = 1 << 16


class Command:
    def __init__(self, cell: Cell, limits: dict[str, Any]) -> None:
        self.cell = cell
        self.limits = limits
        self.kept = {cell.stdout: bytearray(), cell.stderr: bytearray()}
        self.written = {cell.stdout: 0, cell.stderr: 0}
        self.killed_by: str | None = None
        self.peak = watcher.Sample()
        self.reached: set[str] = set()

    def run(self, order: dict[str, Any], stdin: bytes) -> tuple[dict[str, Any], bytes, bytes]:
        self.pending = memoryview(stdin)
        if not self.cell.await_launcher():
            self.cell.monitor.wait()
            self._drain()
            raise OSError(f"no cell for the command: {self.kept[self.cell.stderr].decode(errors='replace').strip()}")
        began = time.monotonic()
        trusted = watcher.pids()  # all that run before the launcher hears of the command
        self.watcher = watcher.Watcher(trusted, self.cell.launcher, self.limits["memory_bytes"])
        self.cell.start(order)
        report = self._watch(began + self.limits["wall_seconds"])
        self.cell.kill()
        self.cell.monitor.wait()
        self._drain()
        self.cell.finish()
        wall = time.monotonic() - began
        return self._outcome(report, wall), bytes(self.kept[self.cell.stdout]), bytes(self.kept[self.cell.stderr])

    def _watch(self, deadline: float) -> dict[str, Any] | None:
        """Serve the streams until the launcher reports the command's end; None where it was ended."""
        cell = self.cell
        with selectors.DefaultSelector() as selector:
            for descriptor in (cell.stdout, cell.stderr, cell.control.fileno(), 0):
                selector.register(descriptor, selectors.EVENT_READ)
            selector.register(cell.stdin, selectors.EVENT_WRITE)
            next_sample = time.monotonic()
            while True:
                for key, _ in selector.select(max(0.0, next_sample - time.monotonic())):
                    if key.fd == cell.control.fileno():
                        report = self._report()
                        return report[0] if report else None
                    if key.fd == 0:
                        os._exit(0)  # the owner is gone, or talks out of turn: all ends with this process
                    if not (self._write() if key.fd == cell.stdin else self._read(key.fd)):
                        selector.unregister(key.fd)
                        cell.close_stream(key.fd)
                now = time.monotonic()
                if now >= next_sample:
                    self._sample()
                    next_sample = time.monotonic() + INTERVAL
                if now >= deadline:
                    self._end("wall time", "wall_seconds")
                if self.killed_by:
                    return None

    def _report(self) -> tuple[dict[str, Any], bytes] | None:
        try:
            return frames.receive(self.cell.control.fileno())
        except ConnectionResetError:  # the launcher was killed from outside
            return None

    def _write(self) -> bool:
        try:
            self.pending = self.pending[os.write(self.cell.stdin, self.pending[:CHUNK]) :]
        except BrokenPipeError:
            return False
        return bool(self.pending)

    def _read(self, descriptor: int) -> bool:
        data = os.read(descriptor, CHUNK)
        room = self.limits["output_bytes"] - len(self.kept[descriptor])
        self.kept[descriptor] += data[:room]
        self.written[descriptor] += len(data)
        if self.written[descriptor] > self.limits["output_bytes"]:
            self.reached.add("output_bytes")
        if sum(self.written.values()) > FLOOD * self.limits["output_bytes"]:
            self._end("output", "output_bytes")
        return bool(data)

    def _drain(self) -> None:
        """Read what is left in the pipes of processes that are gone."""
        for descriptor in (self.cell.stdout, self.cell.stderr):
            while descriptor in self.cell.open and self._read(descriptor):
                pass

    def _sample(self) -> None:
        limits, peak = self.limits, self.peak
        self._disk()
        found = self.watcher.sample()
        peak.processor_seconds = max(peak.processor_seconds, found.processor_seconds)
        peak.memory_bytes = max(peak.memory_bytes, found.memory_bytes)
        peak.processes = max(peak.processes, found.processes)
        if found.processor_seconds > limits["processor_seconds"]:
            self._end("processor time", "processor_seconds")
        if found.memory_bytes > limits["memory_bytes"]:
            self._end("memory", "memory_bytes")

    def _disk(self) -> os.statvfs_result:
        usage = os.statvfs(TREE)
        self.reached |= {
            name for name, free in (("disk_bytes", usage.f_bfree), ("disk_files", usage.f_ffree)) if not free
        }
        return usage

    def _end(self, reason: str, limit: str) -> None:
        self.reached.add(limit)
        self.killed_by = self.killed_by or reason
        self.cell.kill()

    def _outcome(self, report: dict[str, Any] | None, wall: float) -> dict[str, Any]:
        report = None if self.killed_by else report
        status = report["status"] if report else signal.SIGKILL
        disk = self._disk()
        if self.peak.processes >= self.limits["processes"] - 1:  # the launcher counts as well
            self.reached.add("processes")
        memory = max(self.peak.memory_bytes, report["peak"] if report else 0)
        if memory > 0.9 * self.limits["memory_bytes"]:
            self.reached.add("memory_bytes")
        return {
            "exit_code": os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
            "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else None,
            "killed_by": self.killed_by,
            "reached": sorted(self.reached),
            "stdout_bytes": self.written[self.cell.stdout],
            "stderr_bytes": self.written[self.cell.stderr],
            "left_over": report["left_over"] if report else 0,
            "usage": {
                "wall_seconds": round(wall, 6),
                "processor_seconds": round(max(self.peak.processor_seconds, report["processor"] if report else 0.0), 6),
                "memory_bytes": memory,
                "processes": self.peak.processes,
                "disk_bytes": (disk.f_blocks - disk.f_bfree) * disk.f_frsize,
                "disk_files": disk.f_files - disk.f_ffree - 1 - len(FOLDERS),
            },
        }
