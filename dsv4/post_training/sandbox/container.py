"""Sandbox of a container: podman, with an image or a root of the machine's own /usr, around the supervisor."""

import contextlib
import functools
import json
import os
import resource
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsv4.post_training.sandbox.cgroup import OWN_MEMORY, OWN_PROCESSES, amend
from dsv4.post_training.sandbox.inside.cell import CODE, program
from dsv4.post_training.sandbox.interface import SandboxError
from dsv4.post_training.sandbox.limits import Limits
from dsv4.post_training.sandbox.seccomp import engine_profile
from dsv4.post_training.sandbox.supervised import SupervisedSandbox, trial, unused_user
from dsv4.post_training.sandbox.trusted import check_own, code_folder, interpreter

LABEL = "dsv4-sandbox"
END_SECONDS = 20.0  # for podman to see the end of a container and to remove it
HIERARCHY = Path("/sys/fs/cgroup")
# Samples end a command at its limit. The control group is the bound behind them: when it is reached the kernel may end
# the supervisor too, where the memory is shared or page tables, so it must be out of reach within a few samples.
SLACK = 256 << 20
MOST = {"nofile": 4096, "nproc": 4096}  # per process; the command's own are lower


def engine() -> str:
    found = shutil.which("podman")
    if found is None:
        raise SandboxError("podman is missing (Debian: apt-get install podman)")
    return found


@functools.cache
def runtime() -> list[str]:
    """Options that choose podman's runtime: crun, podman's own choice, refuses hierarchies of version 1 and 2 mixed."""
    if not (HIERARCHY / "unified").is_dir():
        return []
    if shutil.which("runc", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin") is None:
        raise SandboxError("runc is missing, which mixed control groups need (Debian: apt-get install runc)")
    return ["--runtime", "runc"]


@functools.cache
def controllers() -> frozenset[str]:
    """Controllers of control groups that podman may use."""
    command = [engine(), *runtime(), "info", "--format", "{{json .Host.CgroupControllers}}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SandboxError(f"podman does not run here: {done.stderr.strip()[-2000:]}")
    return frozenset(json.loads(done.stdout) or ())


def root_folder() -> str:
    """Root of a container without an image: the machine's links into /usr, and empty folders to mount on."""
    made = Path(code_folder() + "-root")
    made.mkdir(0o755, exist_ok=True)
    check_own(made)  # or another user's links in it would have their targets' modes changed, and be mounted on
    for name in ("", "usr", "etc", "proc", "dev", "sys", "run", "run/sandbox", "tmp", "work"):
        (made / name).mkdir(exist_ok=True)
        (made / name).chmod(0o755)  # whatever this process's mask is
    for name in ("bin", "sbin", "lib", "lib32", "lib64"):
        if os.path.islink(f"/{name}"):
            with contextlib.suppress(FileExistsError):
                (made / name).symlink_to(os.readlink(f"/{name}"))
    return str(made)


def profile() -> str:
    """File with the engine's seccomp profile."""
    path = Path(code_folder(), "seccomp.json")  # where no other user can put a link in its place
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(engine_profile()))
    part.replace(path)
    return str(path)


class ContainerSandbox(SupervisedSandbox):
    """Needs podman. `image`: name of one with Python 3 (3.11 or later) and bubblewrap; without one, the machine's /usr.

    `readable`: path inside -> folder or file of the machine. Root starts it as a user without an account.
    """

    name = "container"
    start_seconds: float = 120.0

    def __init__(
        self, limits: Limits | None = None, *, readable: Mapping[str, str] | None = None, image: str | None = None
    ) -> None:
        if image is not None and (not image or image.startswith("-")):
            raise ValueError(f"image is {image!r}; allowed: an image's name, which podman would not take for an option")
        for inside, path in (readable or {}).items():
            if ":" in inside + os.path.realpath(path):
                raise ValueError(f"{inside!r} for {path!r} has a colon; podman ends a volume's path with it")
        self._image = image
        self._name = f"dsv4-sandbox-{os.getpid()}-{secrets.token_hex(8)}"
        self._folder = tempfile.TemporaryDirectory(prefix="dsv4-sandbox-", ignore_cleanup_errors=True)
        self._channel: socket.socket | None = None
        self.root_process = 0  # number of the container's first process, on the machine
        self._files: dict[str, Path] = {}
        super().__init__(limits, readable)

    def _held(self, ready: dict[str, Any]) -> dict[str, str]:
        self.root_process = int(Path(self._folder.name, "pid").read_text())
        self._folder.cleanup()  # now, or an owner that is killed leaves it behind
        groups = "memory" in controllers() and "pids" in controllers()
        self._files = self._event_files() if groups else {}
        mounts = "the machine's /usr" if self._image is None else f"image {self._image}"
        return {
            "memory and processes": "podman's control group" if groups else "limits per process, samples of the sum",
            "access to files": f"podman with {mounts}, mounts"
            + (f", Landlock version {ready['landlock']}" if ready["landlock"] else ""),
        }

    def _bounds(self) -> list[str]:
        """Options of the limits that the container as a whole keeps."""
        limits = self.limits
        options: list[str] = []
        memory = limits.memory_bytes + limits.disk_bytes + OWN_MEMORY + SLACK
        cores = max(1.0, limits.processor_seconds / limits.wall_seconds)
        if "memory" in controllers():
            options += [f"--memory={memory}", f"--memory-swap={memory}"]
        if "pids" in controllers():
            options += [f"--pids-limit={limits.processes + OWN_PROCESSES + 4}"]
        if "cpu" in controllers():
            options += [f"--cpus={min(cores, float(os.cpu_count() or 1)):.2f}"]
        for name, most in MOST.items():
            hard = resource.getrlimit(getattr(resource, f"RLIMIT_{name.upper()}"))[1]
            value = most if hard == resource.RLIM_INFINITY else min(most, hard)
            options += ["--ulimit", f"{name}={value}:{value}"]
        return options

    def _options(self) -> list[str]:
        options = [
            *("--rm", "--name", self._name, "--label", LABEL, "--log-driver=none", "--preserve-fds=1"),
            *("--network=none", "--no-hosts", "--hostname=sandbox", "--http-proxy=false", "--env-host=false"),
            *("--read-only", "--read-only-tmpfs=false", "--cap-drop=all", "--workdir=/"),
            *("--security-opt", "no-new-privileges", "--security-opt", f"seccomp={profile()}"),
            # Each command gets a /proc of its own, which the kernel allows only where nothing of this one is hidden.
            *("--security-opt", "unmask=all", "--security-opt", "label=disable"),
            *("--security-opt", "apparmor=unconfined"),  # engines' profiles refuse the mounts of a command's cell
            f"--pidfile={self._folder.name}/pid",
            *self._bounds(),
            *("--volume", f"{code_folder()}:{CODE}:ro"),
        ]
        if os.getuid() == 0:
            user = unused_user()
            options += [f"--user={user}:{user}"]
        for inside, path in self._readable.items():
            options += ["--volume", f"{os.path.realpath(path)}:{inside}:ro"]
        return options

    def _command(self) -> list[str]:
        command = [engine(), *runtime(), "run", *self._options()]
        if self._image is not None:
            command += ["--entrypoint=[]", self._image, "python3"]
        else:
            python = interpreter()
            outside = [path for path in (str(Path(python).parents[1]),) if path not in ("/usr", "/usr/local")]
            for path in ("/usr", *outside, "/etc/alternatives", "/etc/ld.so.cache"):
                if os.path.exists(path):
                    command += ["--volume", f"{path}:{path}:ro"]
            command += ["--rootfs", root_folder(), python]
        return [*command, *program("entrance"), json.dumps(list(self._readable))]

    def _start(self) -> "subprocess.Popen[bytes]":
        command = self._command()
        self._channel, theirs = socket.socketpair()
        try:
            # podman passes descriptor 3 on. Its own streams are not the sandbox's: they would go through its monitor.
            return subprocess.Popen(
                ["sh", "-c", 'exec "$@" 3<&0 </dev/null', "sh", *command],
                stdin=theirs.fileno(),
                stdout=self._errors,
                stderr=self._errors,
                cwd="/",
                start_new_session=True,  # an interrupt from the terminal is the owner's
            )
        finally:
            theirs.close()

    def _descriptors(self) -> tuple[int, int]:
        assert self._channel is not None
        return self._channel.fileno(), self._channel.fileno()

    def _event_files(self) -> dict[str, Path]:
        """Files in which the kernel counts processes ended for memory, and forks refused."""
        found: dict[str, Path] = {}
        for line in Path(f"/proc/{self.root_process}/cgroup").read_text().splitlines():
            _, names, path = line.split(":", 2)
            for controller, file in (("memory", "memory.oom_control"), ("pids", "pids.events")):
                if controller in names.split(","):
                    found[f"{controller}.events"] = HIERARCHY / controller / path.strip("/") / file
                elif not names and (HIERARCHY / path.strip("/") / f"{controller}.events").exists():
                    found[f"{controller}.events"] = HIERARCHY / path.strip("/") / f"{controller}.events"
        return found

    def _events(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for key, path in self._files.items():
            try:
                lines = path.read_text().splitlines()
            except OSError:  # the container has ended, which the next request says
                continue
            for name, value in map(str.split, lines):
                if name == ("oom_kill" if key == "memory.events" else "max"):
                    counts[key] = int(value)
        return counts

    def _amend(self, outcome: dict[str, Any], before: dict[str, int]) -> None:
        amend(outcome, before, self._events())

    def _interrupt(self) -> None:
        if self._channel is not None:
            self._channel.shutdown(socket.SHUT_RDWR)

    def _end(self) -> None:
        if self._channel is not None:
            with contextlib.suppress(OSError):  # the supervisor, and with it the container, ends with its owner
                self._channel.shutdown(socket.SHUT_RDWR)
            self._channel.close()
            self._channel = None
        if self._process is not None:
            try:
                self._process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                subprocess.run([engine(), "rm", "--force", "--time=0", self._name], capture_output=True, check=False)
                self._process.kill()
                self._process.wait()
        self._folder.cleanup()


@functools.cache
def missing() -> str | None:
    """Reason why no container can be made on this machine; None where one was made."""
    return trial(ContainerSandbox)
