"""Seccomp filter of commands: system calls that no program under test needs and that attack a kernel are refused.

The filter is a classic BPF program that the kernel runs at each system call. Refused calls return an error, so a
program can go on and say what happened; calls of a foreign architecture end the process.
"""

import errno
import platform
import struct
from typing import Any

# name -> number on x86-64, number on arm64; None where an architecture has no such call
REFUSED: dict[str, tuple[int | None, int | None]] = {
    # mounts, roots, namespaces
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "unshare": (272, 97),
    "setns": (308, 268),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    # the machine as a whole
    "reboot": (169, 142),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "acct": (163, 89),
    "syslog": (103, 116),
    "vhangup": (153, 58),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
    "personality": (135, 92),
    # code in the kernel
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "fanotify_init": (300, 262),
    "lookup_dcookie": (212, 18),
    # keys of the user, which are not in a namespace
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    # other processes
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    # memory that no process maps, which only control groups count
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
}
NEWEST = 462  # mseal, Linux 6.10; later calls are unknown here and do not exist for a command

# Calls with which bubblewrap makes a command's own namespaces; the filter of each command refuses them again.
TO_BUILD = {
    *("mount", "umount2", "pivot_root", "chroot", "unshare", "setns", "open_tree", "move_mount", "mount_setattr"),
    *("sethostname", "setdomainname"),
}

ALLOW, ERROR, KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
LOAD, JUMP_EQUAL, JUMP_GREATER_EQUAL, JUMP_ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
# Offsets in struct seccomp_data, little endian.
NUMBER, ARCHITECTURE, FIRST_ARGUMENT, SECOND_ARGUMENT, FOURTH_ARGUMENT = 0, 4, 16, 24, 40
NAMESPACE_FLAGS = 0x7E020080  # CLONE_NEW*: time, mount, cgroup, uts, ipc, user, pid, net
TIOCSTI, TIOCLINUX = 0x5412, 0x541C
UNIX = 1
FAMILIES = (UNIX, 2, 10)  # and AF_INET, AF_INET6, within the sandbox's own empty network
MAP_SHARED, MAP_ANONYMOUS = 0x01, 0x20

# audit architecture; numbers of clone, clone3, ioctl, socket, socketpair, mmap
MACHINES = {
    "x86_64": (0xC000003E, 56, 435, 16, 41, 53, 9),
    "aarch64": (0xC00000B7, 220, 435, 29, 198, 199, 222),
}


def _instruction(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("<HBBI", code, yes, no, value)


def _error(code: int) -> bytes:
    return _instruction(RETURN, ERROR | code)


def seccomp_filter(machine: str | None = None) -> bytes:
    """BPF program for a machine as `platform.machine` names it. ValueError for one without a table."""
    machine = machine or platform.machine()
    if machine not in MACHINES:
        raise ValueError(f"no seccomp filter for {machine}; tables exist for {', '.join(MACHINES)}")
    architecture, clone, clone3, ioctl, socket, socketpair, mmap = MACHINES[machine]
    column = list(MACHINES).index(machine)
    program = [
        _instruction(LOAD, ARCHITECTURE),
        _instruction(JUMP_EQUAL, architecture, 1, 0),
        _instruction(RETURN, KILL_PROCESS),
        _instruction(LOAD, NUMBER),
        # Also the x32 calls of x86-64, whose numbers start at 2 to the power of 30.
        _instruction(JUMP_GREATER_EQUAL, NEWEST + 1, 0, 1),
        _error(errno.ENOSYS),
        # Its flags lie in memory, where a filter cannot look; the C library goes on to clone.
        _instruction(JUMP_EQUAL, clone3, 0, 1),
        _error(errno.ENOSYS),
    ]
    for numbers in REFUSED.values():
        number = numbers[column]
        if number is not None:
            program += [_instruction(JUMP_EQUAL, number, 0, 1), _error(errno.EPERM)]
    program += [
        _instruction(JUMP_EQUAL, clone, 0, 4),
        _instruction(LOAD, FIRST_ARGUMENT),
        _instruction(JUMP_ANY_BIT, NAMESPACE_FLAGS, 0, 1),
        _error(errno.EPERM),
        _instruction(RETURN, ALLOW),
        _instruction(JUMP_EQUAL, ioctl, 0, 5),
        _instruction(LOAD, SECOND_ARGUMENT),
        _instruction(JUMP_EQUAL, TIOCSTI, 1, 0),
        _instruction(JUMP_EQUAL, TIOCLINUX, 0, 1),
        _error(errno.EPERM),
        _instruction(RETURN, ALLOW),
        _instruction(JUMP_EQUAL, socket, 0, 3 + len(FAMILIES)),
        _instruction(LOAD, FIRST_ARGUMENT),
        *(_instruction(JUMP_EQUAL, family, len(FAMILIES) - i, 0) for i, family in enumerate(FAMILIES)),
        _error(errno.EAFNOSUPPORT),
        _instruction(RETURN, ALLOW),
        _instruction(JUMP_EQUAL, socketpair, 0, 4),
        _instruction(LOAD, FIRST_ARGUMENT),
        _instruction(JUMP_EQUAL, UNIX, 1, 0),
        _error(errno.EAFNOSUPPORT),
        _instruction(RETURN, ALLOW),
        # Shared memory without a file keeps pages that no process maps any more, which only control groups count.
        _instruction(JUMP_EQUAL, mmap, 0, 4),
        _instruction(LOAD, FOURTH_ARGUMENT),
        _instruction(JUMP_ANY_BIT, MAP_SHARED, 0, 2),
        _instruction(JUMP_ANY_BIT, MAP_ANONYMOUS, 0, 1),
        _error(errno.EPERM),
        _instruction(RETURN, ALLOW),
    ]
    return b"".join(program)


def engine_profile() -> dict[str, Any]:
    """Profile for a container engine, in its JSON format: around the supervisor, which still has to make cells."""
    names = [name for name in REFUSED if name not in TO_BUILD]
    return {
        "defaultAction": "SCMP_ACT_ALLOW",
        "archMap": [
            {"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86", "SCMP_ARCH_X32"]},
            {"architecture": "SCMP_ARCH_AARCH64", "subArchitectures": ["SCMP_ARCH_ARM"]},
        ],
        "syscalls": [{"names": names, "action": "SCMP_ACT_ERRNO", "errnoRet": errno.EPERM}],
    }
