"""Programs that ask the kernel for what no program under test needs."""

import platform
import struct
from collections.abc import Callable

import pytest

from dsv4.post_training.sandbox.namespaces import NamespaceSandbox
from dsv4.post_training.sandbox.result import Result
from dsv4.post_training.sandbox.seccomp import MACHINES, NEWEST, REFUSED, seccomp_filter
from tests.post_training.sandbox.conftest import Attack, numbers

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
    "the clock by command": Attack('os.system("date -s 2001-01-01")', says="cannot set date: Operation not permitted"),
}
if platform.machine() == "x86_64":
    ATTACKS["calls of 32-bit programs"] = Attack(
        """
import mmap
# mov eax, 20 (getpid of i386); int 0x80; ret
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
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


@pytest.mark.parametrize("machine", MACHINES)
def test_every_jump_of_the_filter_ends_at_an_instruction(machine: str) -> None:
    program = list(struct.iter_unpack("<HBBI", seccomp_filter(machine)))
    column = list(MACHINES).index(machine)
    assert len(program) < 4096 and len(program) * 8 < 1 << 15
    for place, (code, yes, no, _) in enumerate(program):
        assert code not in (0x15, 0x35, 0x45) or place + 1 + max(yes, no) < len(program)
    named = {value for code, _, _, value in program if code == 0x15}
    assert named >= {both[column] for both in REFUSED.values() if both[column] is not None}


def test_a_machine_without_a_table_is_named() -> None:
    with pytest.raises(ValueError, match="no seccomp filter for riscv64; tables exist for x86_64, aarch64"):
        seccomp_filter("riscv64")


def test_rest_has_no_capability_and_no_other_process(sandbox: NamespaceSandbox) -> None:
    lines = sandbox.exec("grep -E 'Cap(Prm|Eff|Bnd|Amb)|Seccomp:|NoNewPrivs' /proc/self/status").text.split()
    assert lines[1::2] == ["0" * 16] * 4 + ["1", "2"]
