"""Base of sandboxes with a supervisor inside: requests, replies, loss and end."""

import functools
import logging
import os
import secrets
import subprocess
import sys
import tempfile
import threading
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, ClassVar

from dsv4.post_training.sandbox.inside import frames
from dsv4.post_training.sandbox.inside.cell import CODE, PATH, TREE
from dsv4.post_training.sandbox.interface import GET_LIMIT, Sandbox, SandboxError, SandboxRefusal, Snapshot
from dsv4.post_training.sandbox.limits import Limits
from dsv4.post_training.sandbox.result import Result, printable, result_from
from dsv4.post_training.sandbox.seccomp import seccomp_filter

logger = logging.getLogger("dsv4")

GRACE_SECONDS = 30.0  # for the supervisor's own work, on a machine under load
SHOWN = 1500  # characters from each end of what a lost sandbox has said
ENVIRONMENT = {"PATH": PATH, "HOME": "/work", "LANG": "C.UTF-8", "TMPDIR": "/tmp"}
RESERVED = ("/work/", "/tmp/", "/dev/", "/proc/", f"{TREE}/", f"{CODE}/", "//")
UNUSED_USERS = (61184, 65519)  # systemd's range for users without an account


def _new_starter() -> None:
    """One thread that lives as long as the process: a sandbox's first process ends with the thread that started it."""
    global _starter
    _starter = ThreadPoolExecutor(1, thread_name_prefix="sandbox")


_new_starter()
os.register_at_fork(after_in_child=_new_starter)


class SupervisedSandbox(Sandbox):
    """A subclass starts the supervisor, as `_process`, and gives two descriptors to talk to it."""

    name: ClassVar[str]
    start_seconds: float = 60.0
    slowness: float = 1.0  # of the inside's own work, beside the machine's

    def __init__(self, limits: Limits | None, readable: Mapping[str, str] | None) -> None:
        for path in readable or {}:
            if not path.startswith("/") or os.path.normpath(path) != path or f"{path}/".startswith(RESERVED):
                allowed = f"absolute ones, neither / nor beneath {', '.join(RESERVED)}"
                raise ValueError(f"{path!r} cannot name a folder inside; allowed: {allowed}")
        self.limits = limits or Limits()
        self._readable = dict(readable or {})
        self._lock = threading.Lock()
        self._closed = False
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process: subprocess.Popen[bytes] | None = None
        #: Layer -> how it is held on this machine.
        self.layers: dict[str, str] = {}
        try:
            self._process = _starter.submit(self._start).result()
            settings = {"limits": asdict(self.limits), "readable": list(self._readable)}
            ready, _ = self._ask(settings, seccomp_filter(), self.start_seconds)
            self.python = ready["python"]
            self.layers = self._held(ready)
        except BaseException:
            self.close()
            raise
        tell(f"{self.name}: " + ", ".join(f"{layer} by {how}" for layer, how in self.layers.items()))

    @abstractmethod
    def _start(self) -> "subprocess.Popen[bytes]":
        """Start the supervisor; runs in a thread that lives as long as the process."""

    @abstractmethod
    def _held(self, ready: dict[str, Any]) -> dict[str, str]:
        """Layers, from the supervisor's first message."""

    def _descriptors(self) -> tuple[int, int]:
        """Descriptors of requests and of replies."""
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        return self._process.stdin.fileno(), self._process.stdout.fileno()

    def _events(self) -> dict[str, int]:
        """Counts of what a control group has seen."""
        return {}

    def _amend(self, outcome: dict[str, Any], before: dict[str, int]) -> None:
        """Add to a command's outcome what a control group has seen since `before`."""

    def _end(self) -> None:
        """End all processes, and wait for that."""
        process = self._process
        if process is not None:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()

    def _interrupt(self) -> None:
        """Make a reply that is awaited fail."""
        assert self._process is not None
        self._process.kill()

    def _ask(self, request: dict[str, Any], body: bytes, seconds: float) -> tuple[dict[str, Any], bytes]:
        """Reply to a request. SandboxRefusal where it is refused, SandboxError where none comes: then it is lost."""
        with self._lock:
            if self._closed:
                raise SandboxError("the sandbox is closed")
            requests, replies = self._descriptors()
            timer = threading.Timer(seconds, self._interrupt)
            timer.daemon = True
            timer.start()
            try:
                frames.send(requests, request, body)
                reply = frames.receive(replies)
            except (BrokenPipeError, ConnectionResetError, ValueError):
                reply = None
            except BaseException:  # such as an interrupt: the reply to come would be taken for the next request's
                self.close()
                raise
            finally:
                timer.cancel()
        if reply is None:
            self._end()
            self._errors.seek(0)
            said = shortened(printable(self._errors.read()).strip())  # of a guest's console, which may be hostile
            self.close()
            raise SandboxError(f"the sandbox was lost: {said or f'no answer within {seconds:g} s'}")
        if "refused" in reply[0]:
            raise SandboxRefusal(reply[0]["refused"])
        return reply

    def exec(
        self,
        command: Sequence[str] | str,
        *,
        stdin: bytes = b"",
        timeout: float | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Result:
        words = ["/bin/sh", "-c", command] if isinstance(command, str) else list(command)
        if not words:
            raise ValueError("the command is empty")
        seconds = self.limits.wall_seconds if timeout is None else min(timeout, self.limits.wall_seconds)
        request = {
            "do": "exec",
            "arguments": words,
            "environment": ENVIRONMENT | dict(environment or {}),
            "timeout": seconds,
        }
        before = self._events()
        outcome, output = self._ask(request, stdin, self.slowness * (seconds + GRACE_SECONDS))
        self._amend(outcome, before)
        split = outcome["split"]
        return result_from(outcome, output[:split], output[split:])

    def put(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        self._ask({"do": "put", "path": path, "mode": mode}, data, self.slowness * GRACE_SECONDS)

    def get(self, path: str, *, limit: int = GET_LIMIT) -> bytes:
        return self._ask({"do": "get", "path": path, "limit": limit}, b"", self.slowness * GRACE_SECONDS)[1]

    def snapshot(self) -> Snapshot:
        return Snapshot(self._ask({"do": "snapshot"}, b"", self.slowness * GRACE_SECONDS)[1])

    def restore(self, snapshot: Snapshot) -> None:
        self._ask({"do": "restore"}, snapshot.data, self.slowness * GRACE_SECONDS)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._end()
        self._errors.close()


def unused_user() -> int:
    """Number of a user without an account, another one for each sandbox that root starts."""
    return UNUSED_USERS[0] + secrets.randbelow(UNUSED_USERS[1] - UNUSED_USERS[0] + 1)


def shortened(text: str) -> str:
    """Beginning and end of a long text: the cause of a loss is first, and the loss last."""
    return text if len(text) <= 2 * SHOWN else f"{text[:SHOWN]}\n...\n{text[-SHOWN:]}"


@functools.cache
def tell(line: str) -> None:
    """Log, once per process, which substrate runs and which layers hold."""
    logger.info("sandbox: %s", line)


def trial(make: type[SupervisedSandbox]) -> str | None:
    """Reason why no sandbox of a kind can be made on this machine; None where one was made."""
    if sys.platform != "linux":
        return f"{make.name} needs Linux, not {sys.platform}"
    try:
        with make() as sandbox:  # pyright: ignore[reportCallIssue]
            result = sandbox.exec(["true"])
    except (SandboxError, OSError, ValueError) as error:
        return str(error)
    return None if result.ok else f"{result.describe()}: {result.stderr.decode(errors='replace').strip()}"
