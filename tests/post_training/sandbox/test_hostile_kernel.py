"""Programs that ask the kernel for what no program under test needs."""

import errno
import platform
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dsv4.post_training.sandbox.inside import landlock
from dsv4.post_training.sandbox.result import Result
from dsv4.post_training.sandbox.seccomp import MACHINES, NEWEST, REFUSED, seccomp_filter
from dsv4.post_training.sandbox.supervised import SupervisedSandbox
from tests.post_training.sandbox.conftest import Attack, numbers

ROOT = Path(__file__).parents[3]

# Arguments are harmless even where the call would be let through.
CALLS = {
    "mount": 'b"none", b"/tmp", b"tmpfs", 0, None',
    "umount2": 'b"/proc", 2',
    "pivot_root": 'b"/work", b"/work"',
    "chroot": 'b"/work"',
    "unshare": "0x10000000",
    "setns": "0, 0",
    "open_tree": '-100, b"/work", 1',
    "fsopen": 'b"tmpfs", 0',
    "open_by_handle_at": "-100, ctypes.create_string_buffer(64), 0",
    "reboot": "0xfee1dead, 672274793, 0, None",
    "sethostname": 'b"sandbox", 7',
    "settimeofday": 'struct.pack("<qq", int(time.time()), 0), None',
    "clock_settime": '0, struct.pack("<qq", int(time.time()), 0)',
    "adjtimex": "ctypes.create_string_buffer(256)",
    "swapon": 'b"/work/x", 0',
    "acct": "None",
    "syslog": "2, ctypes.create_string_buffer(64), 64",
    "init_module": 'b"", 0, b""',
    "finit_module": '0, b"", 0',
    "delete_module": 'b"no_such_module", 0x800',
    "kexec_load": "0, 0, None, 0",
    "bpf": "0, ctypes.create_string_buffer(128), 128",
    "perf_event_open": "ctypes.create_string_buffer(128), 0, -1, -1, 0",
    "userfaultfd": "1",
    "io_uring_setup": "1, ctypes.create_string_buffer(256)",
    "fanotify_init": "0, 0",
    "keyctl": "0, -3, 1",
    "add_key": 'b"user", b"x", b"y", 1, -3',
    "ptrace": "0, 0, None, None",
    "process_vm_readv": "os.getpid(), None, 0, None, 0, 0",
    "pidfd_getfd": "0, 0, 0",
    "personality": "0x0040000",
    "modify_ldt": "0, ctypes.create_string_buffer(16), 16",
    "iopl": "3",
    "quotactl": "0, None, 0, None",
    "memfd_secret": "0",
}
PRESENT = [name for name in CALLS if platform.machine() in MACHINES and name in numbers()]


@pytest.mark.parametrize("name", PRESENT)
def test_a_system_call_is_refused(name: str, run_attack: Callable[[Attack], Result]) -> None:
    run_attack(Attack(f'call("{name}", {CALLS[name]})', says=f"{name} refused: Operation not permitted", exit_code=0))


ATTACKS = {
    "new namespaces by clone": Attack(
        """
number = {"x86_64": 56, "aarch64": 220}[os.uname().machine]
for flag in (0x10000000, 0x20000000, 0x00020000, 0x40000000, 0x02000000):
    done = libc.syscall(number, flag | 17, None, None, None, None)
    if done == 0: os._exit(0)
    print("ESCAPED" if done > 0 else "refused: " + os.strerror(ctypes.get_errno()))
print("clone3", libc.syscall(435, None, 0), os.strerror(ctypes.get_errno()))
""",
        says="refused: Operation not permitted[\\s\\S]*clone3 -1 Function not implemented",
    ),
    "namespaces by commands": Attack(
        'print(os.system("unshare --user --map-root-user true; unshare --net true; bwrap --ro-bind / / true") != 0)',
        says="True",
    ),
    "calls that are newer than the filter": Attack(
        f"done = [libc.syscall(number) for number in range({NEWEST + 1}, {NEWEST + 20})]\n"
        "print(done.count(-1), os.strerror(ctypes.get_errno()))",
        says="19 Function not implemented",
    ),
    "typing into the terminal": Attack(
        """
import fcntl, pty
main, side = pty.openpty()
for request in (0x5412, 0x541C):
    refused(fcntl.ioctl, side, request, b"x")
    refused(fcntl.ioctl, 0, request, b"x")
refused(os.open, "/dev/tty", os.O_RDWR)
""",
        says="refused: PermissionError[\\s\\S]*refused: OSError.*No such device",
    ),
    "a filter of its own": Attack(
        """
libc.prctl(38, 0, 0, 0, 0)
print("no_new_privs", libc.prctl(39, 0, 0, 0, 0))
call("mount", b"none", b"/tmp", b"tmpfs", 0, None)
""",
        says="no_new_privs 1\\nmount refused",
    ),
    "tracing": Attack(
        """
child = os.fork()
if child == 0:
    time.sleep(5)
call("ptrace", 16, child, None, None)
call("process_vm_writev", child, None, 0, None, 0, 0)
os.kill(child, 9)
""",
        says="ptrace refused",
    ),
    "pairs of sockets of other families": Attack(
        """
ends = (ctypes.c_int * 2)()
for family in range(2, 46):
    if libc.socketpair(family, 1, 0, ends) == 0 or ctypes.get_errno() != errno.EAFNOSUPPORT:
        print("ESCAPED", family, os.strerror(ctypes.get_errno()))
print("pair", libc.socketpair(1, 1, 0, ends))
""",
        says="pair 0",
    ),
    "the clock by command": Attack('os.system("date -s 2001-01-01")', says="cannot set date: Operation not permitted"),
}
if platform.machine() == "x86_64":
    ATTACKS["calls of 32-bit programs"] = Attack(
        """
import mmap
# mov eax, 20 (getpid of i386); int 0x80; ret
page = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(b"\\xb8\\x14\\x00\\x00\\x00\\xcd\\x80\\xc3")
print("ESCAPED", ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))())
""",
        signal=31,  # SIGSYS
    )
    ATTACKS["calls of x32 programs"] = Attack(
        'print("x32", libc.syscall(0x40000000 + 39), os.strerror(ctypes.get_errno()))',
        says="x32 -1 Function not implemented",
    )


@pytest.mark.parametrize("name", ATTACKS)
def test_a_hostile_program_stays_in(name: str, run_attack: Callable[[Attack], Result]) -> None:
    run_attack(ATTACKS[name])


ALLOWED, PERMISSION, UNKNOWN, KILLED = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS, 0x80000000
NO_FAMILY = 0x00050000 | errno.EAFNOSUPPORT


def answer(machine: str, number: int, *arguments: int, architecture: int | None = None) -> int:
    """What the filter says to a system call: the filter's program, interpreted."""
    data = struct.pack("<IIQ6Q", number, architecture or MACHINES[machine][0], 0, *(arguments + (0,) * 6)[:6])
    program = list(struct.iter_unpack("<HBBI", seccomp_filter(machine)))
    place = register = 0
    while True:
        code, yes, no, value = program[place]
        if code == 0x06:
            return value
        if code == 0x20:
            (register,) = struct.unpack_from("<I", data, value)
            place += 1
        else:
            holds = {0x15: register == value, 0x35: register >= value, 0x45: bool(register & value)}[code]
            place += 1 + (yes if holds else no)


@pytest.mark.parametrize("machine", MACHINES)
def test_the_filter_refuses_what_its_tables_say_and_no_more(machine: str) -> None:
    column = list(MACHINES).index(machine)
    refused = {both[column] for both in REFUSED.values()}
    _, clone, clone3, ioctl, socket, socketpair, mmap = MACHINES[machine]
    assert len(seccomp_filter(machine)) < 4096  # what the kernel takes, in instructions of 8 bytes, and a pipe holds
    for number in range(NEWEST + 1):
        wanted = PERMISSION if number in refused else UNKNOWN if number == clone3 else ALLOWED
        arguments = (1,) if number in (socket, socketpair) else ()
        assert answer(machine, number, *arguments) == wanted, number
    for number in (NEWEST + 1, 1 << 30, (1 << 30) + 39, (1 << 32) - 1):
        assert answer(machine, number) == UNKNOWN
    assert answer(machine, 0, architecture=0x40000003) == KILLED  # i386
    for flag in (0x10000000, 0x20000000, 0x00020000, 0x40000000, 0x08000000, 0x04000000, 0x02000000):
        assert answer(machine, clone, flag | 17) == PERMISSION
    assert answer(machine, clone, 0x003D0F00) == ALLOWED  # a thread
    for request, wanted in ((0x5412, PERMISSION), (0x541C, PERMISSION), (0x5413, ALLOWED)):
        assert answer(machine, ioctl, 0, request) == wanted
        assert answer(machine, ioctl, 0, request | 1 << 40) == wanted  # the kernel looks at 32 bits
    for family in range(50):
        allowed = family in (1, 2, 10)
        assert (answer(machine, socket, family) == ALLOWED) == allowed
        assert answer(machine, socketpair, family) == (ALLOWED if family == 1 else NO_FAMILY)
    for flags, wanted in ((0x21, PERMISSION), (0x4021, PERMISSION), (0x22, ALLOWED), (0x01, ALLOWED), (0x02, ALLOWED)):
        assert answer(machine, mmap, 0, 4096, 3, flags, 1 << 32, 0) == wanted


def test_landlock_alone_keeps_a_process_from_files(tmp_path: Path) -> None:
    if not landlock.version():
        pytest.skip("the kernel has no Landlock")
    (tmp_path / "open").mkdir()
    (tmp_path / "closed").write_text("x")
    (tmp_path / "program").write_text("#!/bin/sh\n")
    (tmp_path / "program").chmod(0o755)
    code = f"""
import os
from dsv4.post_training.sandbox.inside import landlock
landlock.restrict(["/usr", "/missing"], ["{tmp_path}/open"])
open("{tmp_path}/open/a", "w").write("x")
os.rename("{tmp_path}/open/a", "{tmp_path}/open/b")
os.listdir("/")
for action in (lambda: open("{tmp_path}/closed"), lambda: open("{tmp_path}/closed", "w"), lambda: open("/usr/x", "w"),
               lambda: os.truncate("{tmp_path}/closed", 0), lambda: os.mkdir("{tmp_path}/new"),
               lambda: os.link("{tmp_path}/closed", "{tmp_path}/open/c"),
               lambda: os.execv("{tmp_path}/program", ["x"])):
    try:
        action()
    except PermissionError:
        print("refused")
    except OSError as error:
        print("refused" if error.errno == 18 else error)  # a link across the border
"""
    # no_new_privs, without which only root may restrict itself
    done = subprocess.run(
        ["setpriv", "--no-new-privs", sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.stdout.split() == ["refused"] * 7, done.stderr
    assert (tmp_path / "closed").read_text() == "x"


def test_a_machine_without_a_table_is_named() -> None:
    with pytest.raises(ValueError, match="no seccomp filter for riscv64; tables exist for x86_64, aarch64"):
        seccomp_filter("riscv64")


def test_rest_has_no_capability_and_no_other_process(sandbox: SupervisedSandbox) -> None:
    lines = sandbox.exec("grep -E 'Cap(Prm|Eff|Bnd|Amb)|Seccomp:|NoNewPrivs' /proc/self/status").text.split()
    assert lines[1::2] == ["0" * 16] * 4 + ["1", "2"]
