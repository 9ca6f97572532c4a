"""Cell of one command: process namespace, seccomp filter and launcher, made before the command is known."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from typing import Any

from dsv4.post_training.sandbox.inside import frames

TREE = "/box"  # tmpfs of the sandbox's files
FOLDERS = ("work", "tmp", "shm")
PATH = "/usr/local/bin:/usr/bin:/bin"
CODE = "/run/sandbox"
PACKAGE = "dsv4.post_training.sandbox.inside"


def arguments(filter_descriptor: int, info_descriptor: int) -> list[str]:
    """Command line of bubblewrap, up to the program."""
    return [
        *("bwrap", "--unshare-user", "--disable-userns", "--unshare-pid", "--unshare-ipc", "--unshare-uts"),
        *("--as-pid-1", "--die-with-parent", "--new-session", "--hostname", "sandbox"),
        *("--ro-bind", "/", "/", "--size", "4096", "--tmpfs", TREE, "--remount-ro", TREE),
        *("--bind", f"{TREE}/work", "/work", "--bind", f"{TREE}/tmp", "/tmp", "--proc", "/proc", "--dev", "/dev"),
        *("--bind", f"{TREE}/shm", "/dev/shm", "--remount-ro", "/dev", "--chdir", "/work"),
        *("--seccomp", str(filter_descriptor), "--info-fd", str(info_descriptor), "--"),
    ]


def program(module: str) -> list[str]:
    """Arguments with which Python runs a module of the inner code, without the packages of the machine."""
    run = f"import sys; sys.path.insert(0, {CODE!r}); from {PACKAGE}.{module} import main; main()"
    return ["-I", "-S", "-c", run]


class Cell:
    """Processes and pipes of one command to come."""

    def __init__(self, seccomp_filter: bytes) -> None:
        filter_end, filter_start = os.pipe()
        os.write(filter_start, seccomp_filter)  # a filter is at most 32 KiB, less than a pipe holds
        os.close(filter_start)
        self._info, info_start = os.pipe()
        self.control, control_inside = socket.socketpair()
        input_end, self.stdin = os.pipe()
        self.stdout, output_start = os.pipe()
        self.stderr, error_start = os.pipe()
        inside = control_inside.fileno()
        self.monitor = subprocess.Popen(
            [*arguments(filter_end, info_start), sys.executable, *program("launcher"), str(inside)],
            stdin=input_end,
            stdout=output_start,
            stderr=error_start,
            pass_fds=(filter_end, info_start, inside),
            env={"PATH": PATH},
        )
        for descriptor in (filter_end, info_start, input_end, output_start, error_start):
            os.close(descriptor)
        control_inside.close()
        for descriptor in (self.stdin, self.stdout, self.stderr):
            os.set_blocking(descriptor, False)
        self.launcher = 0
        self.open = {self.stdin, self.stdout, self.stderr}

    def await_launcher(self) -> bool:
        """Wait until the launcher is ready, and learn its process number; False where bubblewrap or it failed."""
        info, self._info = self._info, -1
        with os.fdopen(info, "rb") as opened:
            text = opened.read()
        self.launcher = json.loads(text)["child-pid"] if text else 0
        try:
            return frames.receive(self.control.fileno()) is not None
        except ConnectionResetError:
            return False

    def start(self, order: dict[str, Any]) -> None:
        """Tell the launcher its command."""
        frames.send(self.control.fileno(), order)

    def kill(self) -> None:
        """End every process of the cell: the kernel ends a process namespace with its first process."""
        if self.monitor.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.launcher or self.monitor.pid, signal.SIGKILL)

    def close_stream(self, descriptor: int) -> None:
        if descriptor in self.open:
            self.open.discard(descriptor)
            os.close(descriptor)

    def finish(self) -> None:
        """Wait until every process is gone: the monitor ends after the namespace has."""
        self.monitor.wait()
        self.control.close()
        if self._info >= 0:
            os.close(self._info)
            self._info = -1
        for descriptor in tuple(self.open):
            self.close_stream(descriptor)
