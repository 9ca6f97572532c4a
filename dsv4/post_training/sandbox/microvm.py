"""Sandbox of a virtual machine: qemu with a kernel of its own, and the supervisor in the guest."""

import functools
import logging
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsv4.post_training.sandbox import guest_image
from dsv4.post_training.sandbox.cgroup import ControlGroup
from dsv4.post_training.sandbox.inside.cell import PATH
from dsv4.post_training.sandbox.interface import SandboxError
from dsv4.post_training.sandbox.limits import MIB, Limits
from dsv4.post_training.sandbox.supervised import SupervisedSandbox, trial, unused_user

logger = logging.getLogger("dsv4")

KVM = Path("/dev/kvm")
EMULATE = "DSV4_SANDBOX_EMULATE"
KVM_SECONDS = 30.0  # within which a guest with KVM has answered
EMULATED_SECONDS = 300.0
KERNEL_MEMORY = 160 * MIB  # of the guest's kernel and its supervisor
CONSOLE_BYTES = MIB
# An emulated guest's clock counts instructions, 4 ns each: limits then do not depend on how fast the machine emulates.
EMULATED_CLOCK = "shift=2"
ARCHITECTURE = "x86_64"
FIRMWARE = Path("/usr/share/qemu/qboot.rom")  # starts faster than qemu's own choice
COMMAND_LINE = "console=ttyS0 quiet panic=-1 reboot=t random.trust_cpu=on mitigations=off"


def hypervisor() -> str:
    found = shutil.which(f"qemu-system-{ARCHITECTURE}")
    if found is None:
        raise SandboxError(f"qemu-system-{ARCHITECTURE} is missing (Debian: apt-get install qemu-system-x86)")
    if os.uname().machine != ARCHITECTURE:
        raise SandboxError(f"microvm is for {ARCHITECTURE}; this machine is {os.uname().machine}")
    return found


def emulated() -> bool:
    """True if the environment asks for emulation, which needs no /dev/kvm and is slow."""
    value = os.environ.get(EMULATE, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{EMULATE} is {value!r}; it is 1 for emulation, or 0")
    return value == "1"


class MicrovmSandbox(SupervisedSandbox):
    """Needs qemu, a kernel with modules, and a /dev/kvm on which a guest runs. `image`: folder with the guest's root.

    `readable`: path inside -> folder or file of the machine; a copy of it is in the guest's memory.
    """

    name = "microvm"
    _group: ControlGroup | None = None

    def __init__(
        self, limits: Limits | None = None, *, readable: Mapping[str, str] | None = None, image: str | None = None
    ) -> None:
        self._emulated = emulated()
        self.start_seconds = EMULATED_SECONDS if self._emulated else KVM_SECONDS
        self.slowness = 10.0 if self._emulated else 1.0
        self._image = image
        self._folder = tempfile.TemporaryDirectory(prefix="dsv4-sandbox-", ignore_cleanup_errors=True)
        try:
            super().__init__(limits, readable)
        except SandboxError as error:
            if self._emulated or "was lost" not in str(error):
                raise
            raise SandboxError(
                f"no guest started with {KVM}, as in virtual machines that do not nest; "
                f"{EMULATE}=1 emulates a machine, which is slow ({error})"
            ) from None
        finally:
            self._folder.cleanup()  # the guest has unpacked it

    def _held(self, ready: dict[str, Any]) -> dict[str, str]:
        if self._emulated:
            _warn()
        size = f"a guest of {self._memory() >> 20} MiB, limits per process and samples in it"
        return {
            "kernel": f"{guest_image.kernel()[1]}, {'emulated' if self._emulated else 'KVM'}",
            "memory and processes": size + (", control group around it" if self._group else ""),
            "access to files": "no file of the machine, mounts"
            + (f", Landlock version {ready['landlock']}" if ready["landlock"] else ""),
        }

    def _memory(self) -> int:
        """Bytes of the guest; its root lies twice in memory while it is unpacked."""
        return 2 * self._root_bytes + self.limits.memory_bytes + self.limits.disk_bytes + KERNEL_MEMORY

    def _command(self, root: Path, console: int) -> list[str]:
        cores = min(os.cpu_count() or 1, math.ceil(self.limits.processor_seconds / self.limits.wall_seconds))
        machine = "accel=tcg" if self._emulated else "accel=kvm"
        cores = 1 if self._emulated else cores
        return [
            *(hypervisor(), "-name", "dsv4-sandbox", "-M", f"q35,{machine},usb=off,vmport=off"),
            *("-cpu", "max" if self._emulated else "host", "-smp", str(cores), "-m", f"{self._memory() // MIB + 1}M"),
            *(["-icount", EMULATED_CLOCK] if self._emulated else []),
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-monitor", "none", "-net", "none"),
            *(["-bios", str(FIRMWARE)] if FIRMWARE.exists() else []),
            *("-kernel", str(guest_image.kernel()[0]), "-initrd", str(root), "-append", COMMAND_LINE),
            *("-add-fd", f"fd={console},set=1", "-chardev", "file,id=console,path=/dev/fdset/1"),
            *("-serial", "chardev:console", "-chardev", "stdio,id=owner,signal=off"),
            *("-device", "virtio-serial-pci", "-device", "virtserialport,chardev=owner,name=owner"),
            *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
        ]

    def _start(self) -> "subprocess.Popen[bytes]":
        hypervisor()
        if not self._emulated and not KVM.exists():
            raise SandboxError(f"{KVM} is missing; {EMULATE}=1 emulates a machine, which is slow")
        user = unused_user() if os.getuid() == 0 else None
        root = guest_image.built(self._image)
        if self._readable:
            own = Path(self._folder.name, "root")
            guest_image.with_readable(root, self._readable, own)
            if user is not None:
                os.chown(self._folder.name, user, user)  # a folder that only its owner and root enter
            root = own
        self._root_bytes = root.stat().st_size
        self._group = ControlGroup.make(self.limits)
        if self._group is not None:
            self._group.limit_machine(self._memory())
        console = os.open(f"/proc/self/fd/{self._errors.fileno()}", os.O_WRONLY | os.O_APPEND)
        # Ends with its owner; what a guest that took over its kernel writes to the console has an end, too.
        command = ["prlimit", f"--fsize={CONSOLE_BYTES}", "--core=0", "setpriv", "--pdeathsig=KILL", "--no-new-privs"]
        if user is not None:
            command += self._unprivileged(user)
        command += self._command(root, console)
        if self._group is not None:
            command = self._group.entering(command)
        try:
            return subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                pass_fds=(console,),
                env={"PATH": os.environ.get("PATH", PATH)},
                cwd="/",
                bufsize=0,
            )
        finally:
            os.close(console)

    def _unprivileged(self, user: int) -> list[str]:
        """Options of setpriv for a user without an account, who may open /dev/kvm where it is needed."""
        options = [f"--reuid={user}", f"--regid={user}"]
        if self._emulated:
            return [*options, "--clear-groups"]
        found = KVM.stat()
        if found.st_mode & 0o006 != 0o006 and found.st_mode & 0o060 != 0o060:
            raise SandboxError(f"only root may use {KVM}: give it a group that may (chgrp kvm {KVM}; chmod 660 {KVM})")
        return [*options, f"--groups={found.st_gid}"]

    def _end(self) -> None:
        super()._end()
        if self._group is not None:
            self._group.remove()
            self._group = None


@functools.cache
def _warn() -> None:
    logger.warning("sandbox: microvm emulates a machine, which is many times slower than with %s", KVM)


@functools.cache
def missing() -> str | None:
    """Reason why no virtual machine can be made on this machine; None where one was made."""
    return trial(MicrovmSandbox)
