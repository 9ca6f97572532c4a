"""Sandbox of Linux namespaces: bubblewrap, a seccomp filter, Landlock, and control groups where they are delegated."""

import functools
import hashlib
import logging
import os
import secrets
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dsv4.post_training.sandbox.cgroup import ControlGroup
from dsv4.post_training.sandbox.inside import frames
from dsv4.post_training.sandbox.inside.cell import CODE, PACKAGE, PATH, TREE, program
from dsv4.post_training.sandbox.interface import GET_LIMIT, Sandbox, SandboxError, Snapshot
from dsv4.post_training.sandbox.limits import Limits
from dsv4.post_training.sandbox.result import Result, result_from
from dsv4.post_training.sandbox.seccomp import seccomp_filter

logger = logging.getLogger("dsv4")

START_SECONDS = 60.0
GRACE_SECONDS = 30.0  # for the supervisor's own work, on a machine under load
ENVIRONMENT = {"PATH": PATH, "HOME": "/work", "LANG": "C.UTF-8", "TMPDIR": "/tmp"}
USER = 1000  # inside
UNUSED_USERS = (61184, 65519)  # systemd's range for users without an account
SYSTEM = ("alternatives", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "localtime", "mime.types", "ssl/certs")
DEVICES = ("full", "null", "random", "tty", "urandom", "zero")
RESERVED = ("/work/", "/tmp/", "/dev/", "/proc/", f"{TREE}/", f"{CODE}/", "//")
ACCOUNTS = {
    "passwd": f"sandbox:x:{USER}:{USER}::/work:/bin/sh\n",
    "group": f"sandbox:x:{USER}:\n",
    "hosts": "127.0.0.1 localhost sandbox\n",
}

_starter: ThreadPoolExecutor | None = None


def _start_thread() -> ThreadPoolExecutor:
    """One thread that lives as long as the process: bubblewrap ends with the thread that started it."""
    global _starter
    if _starter is None:
        _starter = ThreadPoolExecutor(1, thread_name_prefix="sandbox")
    return _starter


def _forget_thread() -> None:
    global _starter
    _starter = None


os.register_at_fork(after_in_child=_forget_thread)


@functools.cache
def interpreter() -> str:
    """Python that every user of the machine may execute: this one, or the system's. SandboxError if there is none."""
    tried = [f"{sys.base_prefix}/bin/python3", "/usr/local/bin/python3", "/usr/bin/python3"]
    for path in tried:
        real = Path(os.path.realpath(path))
        if real.is_file() and (os.getuid() != 0 or all(folder.stat().st_mode & 0o5 == 0o5 for folder in real.parents)):
            return str(real)
    raise SandboxError(f"no Python that all users may execute; tried {', '.join(tried)}")


@functools.cache
def _code() -> str:
    """Folder with a compiled copy of the inner code that every user may read, without this package around it.

    It is named by its contents and shared by processes of one user, so that one that is killed leaves nothing behind.
    """
    sources = {path.name: path.read_bytes() for path in sorted(Path(__file__).with_name("inside").glob("*.py"))}
    digest = hashlib.sha256(repr((interpreter(), sys.version, sources)).encode()).hexdigest()[:16]
    shared = Path(tempfile.gettempdir(), f"dsv4-sandbox-{os.getuid()}-{digest}")
    if not shared.exists():
        made = Path(tempfile.mkdtemp(prefix="dsv4-sandbox-"))
        folder = made.joinpath(*PACKAGE.split("."))
        folder.mkdir(parents=True)
        for name, source in sources.items():
            (folder / name).write_bytes(source)
        subprocess.run([interpreter(), "-I", "-S", "-m", "compileall", "-q", str(made)], check=True, env={})
        for path in (made, *made.rglob("*")):  # whatever this process's mask is
            path.chmod(0o755 if path.is_dir() else 0o644)
        try:
            made.rename(shared)
        except OSError:  # another process was first
            shutil.rmtree(made)
    found = shared.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise SandboxError(f"{shared} is not this user's own folder; remove it")
    return str(shared)


def _bubblewrap() -> str:
    found = shutil.which("bwrap")
    if found is None:
        raise SandboxError("bwrap is missing (Debian: apt-get install bubblewrap)")
    return found


def arguments(code: str, readable: Mapping[str, str], data: Mapping[str, int]) -> list[str]:
    """Command line of bubblewrap, up to the program. `data`: file beneath /etc -> descriptor of its contents."""
    command = [
        *(
            _bubblewrap(),
            "--unshare-all",
            "--unshare-user",
            "--uid",
            str(USER),
            "--gid",
            str(USER),
            "--hostname",
            "sandbox",
        ),
        *("--die-with-parent", "--new-session", "--clearenv", "--setenv", "PATH", PATH),
        *("--cap-add", "CAP_SYS_ADMIN"),  # for one mount; the supervisor then drops it
        *("--ro-bind", "/usr", "/usr", "--proc", "/proc"),
    ]
    for name in DEVICES:  # "--dev" would put the supervisor into a second user namespace, where it may not mount
        command += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    for name in ("bin", "sbin", "lib", "lib32", "lib64"):
        if os.path.islink(f"/{name}"):
            command += ["--symlink", os.readlink(f"/{name}"), f"/{name}"]
        elif os.path.isdir(f"/{name}"):
            command += ["--ro-bind", f"/{name}", f"/{name}"]
    for name in SYSTEM:
        command += ["--ro-bind-try", f"/etc/{name}", f"/etc/{name}"]
    for name, descriptor in data.items():
        command += ["--ro-bind-data", str(descriptor), f"/etc/{name}"]
    for inside, path in readable.items():
        command += ["--ro-bind", path, inside]
    command += ["--ro-bind", code, CODE, "--dir", TREE, "--dir", "/work", "--dir", "/tmp", "--chdir", "/", "--"]
    return command


class NamespaceSandbox(Sandbox):
    """Needs Linux, bubblewrap, and leave to make user namespaces. Root starts it as a user without an account.

    `readable`: path inside -> folder or file of the machine, which that user may read.
    """

    def __init__(self, limits: Limits | None = None, *, readable: Mapping[str, str] | None = None) -> None:
        for path in readable or {}:
            if os.path.normpath(path) != path or f"{path}/".startswith(RESERVED):
                raise ValueError(f"{path!r} cannot name a folder inside: neither / nor beneath {', '.join(RESERVED)}")
        limits = limits or Limits()
        self.limits = limits
        self.python = interpreter()
        self._lock = threading.Lock()
        self._closed = False
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._group = ControlGroup.make(limits)
        prefix = str(Path(self.python).parents[1])
        self._readable = dict(readable or {}) | ({} if prefix in ("/usr", "/usr/local") else {prefix: prefix})
        try:
            self._process = _start_thread().submit(self._start).result()
            settings = {"limits": asdict(limits), "readable": list(self._readable)}
            ready, _ = self._ask(settings, seccomp_filter(), START_SECONDS)
        except BaseException:
            self.close()
            raise
        #: Layer -> how it is held on this machine.
        self.layers = {
            "memory and processes": "control group" if self._group else "limits per process, samples of the sum",
            "access to files": f"mounts, Landlock version {ready['landlock']}" if ready["landlock"] else "mounts",
        }
        _tell(", ".join(f"{layer} by {how}" for layer, how in self.layers.items()))

    def _start(self) -> "subprocess.Popen[bytes]":
        data = {name: _memory_file(text.encode()) for name, text in ACCOUNTS.items()}
        command = [*arguments(_code(), self._readable, data), self.python, *program("supervisor")]
        user = group = groups = None
        if os.getuid() == 0:
            user = UNUSED_USERS[0] + secrets.randbelow(UNUSED_USERS[1] - UNUSED_USERS[0] + 1)
            if self._group is None:
                group, groups = user, list[int]()
            else:
                command = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", *command]
                user = None
        if self._group is not None:
            command = self._group.entering(command)
        try:
            return subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                pass_fds=tuple(data.values()),
                env={"PATH": os.environ.get("PATH", PATH)},
                cwd="/",
                bufsize=0,
                user=user,
                group=group,
                extra_groups=groups,
            )
        finally:
            for descriptor in data.values():
                os.close(descriptor)

    def _ask(self, request: dict[str, Any], body: bytes, seconds: float) -> tuple[dict[str, Any], bytes]:
        """Reply to a request. SandboxError where it is refused, or none comes in time; then the sandbox is lost."""
        with self._lock:
            if self._closed:
                raise SandboxError("the sandbox is closed")
            stdin, stdout = self._process.stdin, self._process.stdout
            assert stdin is not None and stdout is not None
            timer = threading.Timer(seconds, self._process.kill)
            timer.daemon = True
            timer.start()
            try:
                frames.send(stdin.fileno(), request, body)
                reply = frames.receive(stdout.fileno())
            except (BrokenPipeError, ValueError):
                reply = None
            except BaseException:  # such as an interrupt: the reply to come would be taken for the next request's
                self.close()
                raise
            finally:
                timer.cancel()
        if reply is None:
            self._process.kill()
            self._process.wait()
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace").strip()[-2000:]
            self.close()
            raise SandboxError(f"the sandbox was lost: {said or f'no answer within {seconds:g} s'}")
        if "refused" in reply[0]:
            raise SandboxError(reply[0]["refused"])
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
        before = self._group.events() if self._group else {}
        outcome, output = self._ask(request, stdin, seconds + GRACE_SECONDS)
        if self._group:
            self._group.amend(outcome, before)
        split = outcome["split"]
        return result_from(outcome, output[:split], output[split:])

    def put(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        self._ask({"do": "put", "path": path, "mode": mode}, data, GRACE_SECONDS)

    def get(self, path: str, *, limit: int = GET_LIMIT) -> bytes:
        return self._ask({"do": "get", "path": path, "limit": limit}, b"", GRACE_SECONDS)[1]

    def snapshot(self) -> Snapshot:
        return Snapshot(self._ask({"do": "snapshot"}, b"", GRACE_SECONDS)[1])

    def restore(self, snapshot: Snapshot) -> None:
        self._ask({"do": "restore"}, snapshot.data, GRACE_SECONDS)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        process = getattr(self, "_process", None)
        if process is not None:
            process.kill()  # its namespace, and all in it, ends with it
            process.wait()
            for stream in (process.stdin, process.stdout):
                stream.close()
        self._errors.close()
        if self._group is not None:
            self._group.remove()


@functools.cache
def _tell(line: str) -> None:
    """Log, once per process, which layers hold."""
    logger.info("sandbox: %s", line)


def _memory_file(data: bytes) -> int:
    descriptor = os.memfd_create("sandbox")
    os.write(descriptor, data)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


@functools.cache
def missing() -> str | None:
    """Reason why no sandbox can be made on this machine; None where one was made."""
    if sys.platform != "linux":
        return f"namespaces need Linux, not {sys.platform}"
    try:
        with NamespaceSandbox(Limits()) as sandbox:
            result = sandbox.exec(["true"])
    except (SandboxError, OSError, ValueError) as error:
        return str(error)
    return None if result.ok else f"{result.describe()}: {result.stderr.decode(errors='replace').strip()}"
