"""Hostile programs run in a sandbox with small limits; after each, the machine outside is looked over."""

import json
import os
import platform
import re
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from dsv4.post_training.sandbox import namespaces, seccomp
from dsv4.post_training.sandbox.container import ContainerSandbox
from dsv4.post_training.sandbox.interface import Snapshot
from dsv4.post_training.sandbox.limits import MIB, Limits
from dsv4.post_training.sandbox.microvm import MicrovmSandbox
from dsv4.post_training.sandbox.namespaces import NamespaceSandbox
from dsv4.post_training.sandbox.result import Reason, Result
from dsv4.post_training.sandbox.substrates import missing
from dsv4.post_training.sandbox.supervised import SupervisedSandbox

SMALL = Limits(
    wall_seconds=30,
    processor_seconds=10,
    memory_bytes=96 * MIB,
    processes=24,
    disk_bytes=4 * MIB,
    disk_files=200,
    output_bytes=64 << 10,
    open_files=64,
)
EMPTY = Snapshot(struct.pack("<Q", 3) + b"[]\n[]\n")
TRUSTED = 8  # bubblewrap, supervisor, launcher: processes of a sandbox at rest

# Programs print what was refused, and ESCAPED for what should have been.
PRELUDE = """
import ctypes, errno, json, os, signal, socket, struct, subprocess, sys, time
libc = ctypes.CDLL(None, use_errno=True)
NUMBERS = json.loads({numbers!r})
SECRET, OUTER, PORT, PYTHON = {secret!r}, {outer}, {port}, {python!r}

def call(name, *arguments):
    done = libc.syscall(NUMBERS[name], *arguments)
    print(name, "ESCAPED" if done >= 0 else "refused: " + os.strerror(ctypes.get_errno()), flush=True)

def refused(action, *arguments, **more):
    try:
        print("ESCAPED", action(*arguments, **more), flush=True)
    except Exception as error:
        print("refused:", repr(error), flush=True)
"""


@dataclass(frozen=True)
class Attack:
    """A hostile program in Python (after PRELUDE), and what its result must say."""

    source: str
    says: str | None = None  # pattern in its output
    killed_by: Sequence[Reason | None] = (None,)
    reached: str | None = None
    signal: int | None = None
    exit_code: int | None = None
    left_over: int = 0  # at least
    timeout: float | None = None
    limits: Limits = SMALL


def numbers() -> dict[str, int]:
    column = list(seccomp.MACHINES).index(platform.machine())
    return {name: found for name, both in seccomp.REFUSED.items() if (found := both[column]) is not None}


@pytest.fixture(scope="session", autouse=True)
def possible() -> None:
    reason = namespaces.missing()
    if reason:
        pytest.skip(f"no sandbox of namespaces: {reason}")


KINDS: dict[str, type[SupervisedSandbox]] = {
    kind.name: kind for kind in (NamespaceSandbox, ContainerSandbox, MicrovmSandbox)
}


@pytest.fixture(
    scope="session",
    params=[
        "namespaces",
        pytest.param("container", marks=pytest.mark.container),
        pytest.param("microvm", marks=pytest.mark.microvm),
    ],
)
def kind(request: pytest.FixtureRequest) -> type[SupervisedSandbox]:
    """Each substrate that this machine has; `-m container` and `-m microvm` ask for those beside namespaces."""
    reason = missing(request.param)
    if reason:
        pytest.skip(f"no sandbox of {request.param}: {reason}")
    return KINDS[request.param]


@pytest.fixture(scope="module")
def sandbox(kind: type[SupervisedSandbox]) -> Iterator[SupervisedSandbox]:
    with kind(SMALL) as made:  # pyright: ignore[reportCallIssue]
        yield made


@pytest.fixture(scope="session")
def outside() -> Iterator["Outside"]:
    """Things on the machine that a program in a sandbox would like to reach."""
    until_its_input_ends = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    with (
        subprocess.Popen(until_its_input_ends, stdin=subprocess.PIPE) as process,
        tempfile.TemporaryDirectory() as folder,  # not pytest's, which other users cannot enter
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as unix,
    ):
        unix.bind(f"\0dsv4-outside-{os.getpid()}")
        unix.listen()
        server.setblocking(False)
        unix.setblocking(False)
        yield Outside(Path(folder), process, server, unix)
        process.kill()


class Outside:
    def __init__(
        self, folder: Path, process: "subprocess.Popen[bytes]", server: socket.socket, unix: socket.socket
    ) -> None:
        folder.chmod(0o755)  # so that only the sandbox keeps a program from it
        self.secret = folder / "secret"
        self.secret.write_text("the secret")
        self.secret.chmod(0o666)
        self.shown = folder / "shown"
        self.shown.mkdir(mode=0o755)
        (self.shown / "file").write_text("seen")
        self.process = process
        self.server, self.unix = server, unix
        self.clock = time.time() - time.monotonic()
        self.state = self.look()

    def look(self) -> dict[str, object]:
        return {
            "secret": self.secret.read_text(),
            "beside": sorted(os.listdir(self.secret.parent) + os.listdir(self.shown)),
            "process": self.process.poll(),
            "host": socket.gethostname(),
            "mounts": [line for line in Path("/proc/self/mounts").read_text().splitlines() if " /box " in line],
            "clock": round((time.time() - time.monotonic() - self.clock) / 10),  # 0 up to a step of 5 seconds
            "mask": os.umask(os.umask(0o022)),
        }

    def assert_unharmed(self, sandbox: SupervisedSandbox) -> None:
        assert self.look() == self.state
        for listener in (self.server, self.unix):
            with pytest.raises(BlockingIOError):
                listener.accept()
        inside = inner_processes(sandbox)
        assert len(inside) <= TRUSTED, [process.cmdline() for process in inside]
        assert all("bwrap" in str(found) or "sandbox.inside" in str(found) for found in map(words, inside) if found)


def pid_of(box: SupervisedSandbox) -> int:
    assert box._process is not None
    return box._process.pid


def inner_processes(sandbox: SupervisedSandbox) -> list[psutil.Process]:
    """Processes of a sandbox as the machine sees them: none of a virtual machine's, which is one process."""
    assert sandbox._process is not None
    top = sandbox.root_process if isinstance(sandbox, ContainerSandbox) else sandbox._process.pid
    return psutil.Process(top).children(recursive=True)


def lose(sandbox: SupervisedSandbox) -> None:
    """End all processes of a sandbox, as the machine does that runs out of memory."""
    assert sandbox._process is not None
    inside = inner_processes(sandbox)
    sandbox._process.kill()
    sandbox._process.wait()
    psutil.wait_procs(inside)


def words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.fixture
def run_attack(sandbox: SupervisedSandbox, outside: Outside) -> Callable[[Attack], Result]:
    def run(attack: Attack) -> Result:
        if attack.limits is not SMALL:
            with type(sandbox)(attack.limits) as own:  # pyright: ignore[reportCallIssue]
                return attempt(attack, own)
        return attempt(attack, sandbox)

    def attempt(attack: Attack, box: SupervisedSandbox) -> Result:
        prelude = PRELUDE.format(
            numbers=json.dumps(numbers()),
            secret=str(outside.secret),
            outer=outside.process.pid,
            port=outside.server.getsockname()[1],
            python=box.python,
        )
        box.restore(EMPTY)
        result = box.exec([box.python, "-I", "-S", "-c", prelude + attack.source], timeout=attack.timeout)
        outside.assert_unharmed(box)
        check(attack, result)
        again = box.exec("echo alive")
        assert again.stdout == b"alive\n", again.describe()
        return result

    return run


def check(attack: Attack, result: Result) -> None:
    said = (result.stdout + result.stderr).decode(errors="replace")
    shown = f"{result.describe()}\n{said[-2000:]}"
    assert "ESCAPED" not in said, shown
    assert "the secret" not in said, shown
    if attack.says is not None:
        assert re.search(attack.says, said), shown
    assert result.killed_by in attack.killed_by, shown
    if attack.reached is not None:
        assert attack.reached in result.reached, shown
    if attack.signal is not None:
        assert result.signal == attack.signal, shown
    if attack.exit_code is not None:
        assert result.exit_code == attack.exit_code, shown
    assert result.left_over >= attack.left_over, shown
