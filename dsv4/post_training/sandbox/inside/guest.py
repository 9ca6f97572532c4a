"""First process of a virtual machine's guest: mounts, modules, the channel to the owner, then the way in."""

import ctypes
import json
import os
import select
import sys
import time
from pathlib import Path

from dsv4.post_training.sandbox.inside.entrance import USER, enter

MODULES = Path("/run/dsv4-modules")
READABLE = Path("/run/readable.json")  # paths that commands may read beside the system
PORTS = Path("/sys/class/virtio-ports")
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_MOVE, MS_REC = 2, 4, 8, 4096, 8192, 16384
FINIT_MODULE = 313  # x86-64
POWER_OFF = 0x4321FEDC
PORT_SECONDS = 60.0
libc = ctypes.CDLL(None, use_errno=True)


def checked(what: str, done: int) -> None:
    if done:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def mount(source: str, target: str, kind: str, flags: int = 0, options: str = "") -> None:
    done = libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode())
    checked(f"mount {target}", done)


def prepare() -> None:
    """Make what the supervisor needs of a machine."""
    # bubblewrap leaves its root behind, which the kernel refuses for the first root of all: put one on top of it.
    os.makedirs("/root-of-guest", exist_ok=True)
    mount("/", "/root-of-guest", "", MS_BIND)
    os.chdir("/root-of-guest")
    mount(".", "/", "", MS_MOVE)
    os.chroot(".")
    os.chdir("/")
    for folder in ("/proc", "/sys", "/dev", "/tmp"):
        os.makedirs(folder, exist_ok=True)
    mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    mount("sysfs", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    mount("devtmpfs", "/dev", "devtmpfs", MS_NOSUID)
    for name in ("null", "zero", "full", "random", "urandom", "tty"):
        os.chmod(f"/dev/{name}", 0o666)
    mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777,size=1m")
    for module in sorted(MODULES.iterdir()) if MODULES.is_dir() else []:
        file = os.open(module, os.O_RDONLY)
        checked(f"module {module.name}", libc.syscall(FINIT_MODULE, file, b"", 0))
        os.close(file)
    Path("/proc/sys/kernel/printk").write_text("1")
    Path("/proc/sys/kernel/core_pattern").write_text("")


def channel() -> int:
    """Descriptor of the port to the owner, once the owner has opened its end."""
    deadline = time.monotonic() + PORT_SECONDS
    while time.monotonic() < deadline:
        for name in os.listdir(PORTS) if PORTS.is_dir() else []:
            try:
                port = os.open(f"/dev/{name}", os.O_RDWR)
            except OSError:  # it is being made
                continue
            poll = select.poll()
            poll.register(port, select.POLLIN | select.POLLOUT)
            if not any(event & select.POLLHUP for _, event in poll.poll(100)):
                return port
            os.close(port)
        time.sleep(0.005)
    raise OSError(f"no port to the owner within {PORT_SECONDS:g} s")


def main() -> None:
    prepare()
    port = channel()
    readable = {path: path for path in json.loads(READABLE.read_text())} if READABLE.exists() else {}
    child = os.fork()
    if child == 0:
        os.dup2(port, 0)
        os.dup2(port, 1)
        os.setgroups([])
        os.setgid(USER)
        os.setuid(USER)
        enter(readable)
    while os.waitpid(-1, 0)[0] != child:
        pass
    sys.stderr.flush()
    libc.reboot(POWER_OFF)
