"""First trusted program inside a sandbox: holds the file tree, and answers its owner's requests one after another."""

import ctypes
import os
import resource
import struct
import sys
from typing import Any

from dsv4.post_training.sandbox.inside import files, frames, landlock, tree
from dsv4.post_training.sandbox.inside.cell import CODE, FOLDERS, TREE, Cell
from dsv4.post_training.sandbox.inside.command import Command

MS_NOSUID, MS_NODEV = 2, 4
PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
CAPABILITY_VERSION_3 = 0x20080522
READABLE = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc", "/proc", "/dev", CODE)
# Not /dev/zero: pages of a shared map of it stay when no process maps them any more (seccomp.py).
WRITABLE = ("/work", "/tmp", "/dev/shm", "/dev/null", "/dev/full", "/dev/tty", "/dev/pts", "/dev/ptmx")


def main() -> None:
    message = frames.receive(0)
    if message is not None:
        Supervisor(*message).serve()


def mount_tree(disk_bytes: int, disk_files: int) -> None:
    """Mount the limited file tree, then give up the capability to mount."""
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"size={disk_bytes},nr_inodes={disk_files + 1 + len(FOLDERS)},mode=700".encode()
    if libc.mount(b"tmpfs", TREE.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, options):
        raise OSError(ctypes.get_errno(), f"cannot mount {TREE}: {os.strerror(ctypes.get_errno())}")
    libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    if libc.capset(struct.pack("<Ii", CAPABILITY_VERSION_3, 0), struct.pack("<6I", 0, 0, 0, 0, 0, 0)):
        raise OSError(ctypes.get_errno(), "cannot give up capabilities")
    for name in FOLDERS:
        os.mkdir(f"{TREE}/{name}", 0o700)


class Supervisor:
    def __init__(self, settings: dict[str, Any], seccomp_filter: bytes) -> None:
        self.limits: dict[str, Any] = settings["limits"]
        self.readable = [*READABLE, *settings["readable"]]
        self.filter = seccomp_filter
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a tree's files with several names are held open
        mount_tree(self.limits["disk_bytes"], self.limits["disk_files"])
        self.cell = Cell(self.filter)

    def serve(self) -> None:
        frames.send(1, {"landlock": landlock.version(), "python": sys.executable})
        while (message := frames.receive(0)) is not None:
            request, body = message
            try:
                header, data = getattr(self, "do_" + request["do"])(request, body)
            except files.Refused as error:
                header, data = {"refused": str(error)}, b""
            except OSError as error:
                header, data = {"refused": f"{request['do']}: {error}"}, b""
            frames.send(1, header, data)

    def do_exec(self, request: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        order = {
            "arguments": request["arguments"],
            "environment": request["environment"],
            "directory": "/work",
            "readable": self.readable,
            "writable": WRITABLE,
            "rlimits": rlimits(self.limits),
        }
        limits = self.limits | {"wall_seconds": min(request["timeout"], self.limits["wall_seconds"])}
        if self.cell.monitor.poll() is not None:  # ended while it waited
            self._new_cell()
        try:
            outcome, stdout, stderr = Command(self.cell, limits).run(order, body)
        finally:
            try:
                tree.clear(f"{TREE}/shm")
            finally:
                self._new_cell()  # ready before the next command is known
        return outcome | {"split": len(stdout)}, stdout + stderr

    def _new_cell(self) -> None:
        self.cell.kill()
        self.cell.finish()
        for name in FOLDERS:
            os.chmod(f"{TREE}/{name}", 0o700)  # a command may have changed it, and a cell starts in one of them
        self.cell = Cell(self.filter)

    def do_put(self, request: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        files.write(f"{TREE}/work", self._beneath(request["path"]), body, request["mode"])
        return {}, b""

    def do_get(self, request: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        return {}, files.read(f"{TREE}/work", self._beneath(request["path"]), request["limit"])

    def _beneath(self, path: str) -> str:
        return "/".join(files.parts_of(path, "/work"))

    def do_snapshot(self, request: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        work = tree.pack(f"{TREE}/work")
        return {}, struct.pack("<Q", len(work)) + work + tree.pack(f"{TREE}/tmp")

    def do_restore(self, request: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        (length,) = struct.unpack_from("<Q", body)
        for name, part in (("work", body[8 : 8 + length]), ("tmp", body[8 + length :])):
            tree.clear(f"{TREE}/{name}")
            tree.unpack(f"{TREE}/{name}", part)
        return {}, b""


def rlimits(limits: dict[str, Any]) -> list[tuple[str, int]]:
    """Limits per process that back the watched ones; processes are counted by the command's user namespace."""
    return [
        ("RLIMIT_CORE", 0),
        ("RLIMIT_CPU", int(limits["processor_seconds"]) + 2),
        ("RLIMIT_DATA", 2 * limits["memory_bytes"]),  # counts memory that is only reserved, such as threads' stacks
        ("RLIMIT_FSIZE", limits["disk_bytes"]),
        ("RLIMIT_MEMLOCK", 0),
        ("RLIMIT_MSGQUEUE", 0),
        ("RLIMIT_NICE", 0),
        ("RLIMIT_NOFILE", limits["open_files"]),
        ("RLIMIT_NPROC", limits["processes"]),
        ("RLIMIT_RTPRIO", 0),
        ("RLIMIT_SIGPENDING", 1024),
        ("RLIMIT_STACK", min(8 << 20, limits["memory_bytes"])),
    ]
