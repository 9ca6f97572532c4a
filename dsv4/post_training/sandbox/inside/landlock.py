"""Landlock: the process and its children keep access to the named folders only. Standard library and system calls."""

import ctypes
import os
import struct
from collections.abc import Sequence

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same numbers on every architecture
RULE_PATH_BENEATH = 1
VERSION_FLAG = 1

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
REFER, TRUNCATE, IOCTL_DEVICE = 1 << 13, 1 << 14, 1 << 15
FIRST_RIGHTS = (1 << 13) - 1
ON_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEVICE
READ = EXECUTE | READ_FILE | READ_DIR
SCOPES = 0b11  # abstract sockets and signals stay within

_libc = ctypes.CDLL(None, use_errno=True)


def version() -> int:
    """ABI version of the kernel's Landlock; 0 where it is missing or off."""
    return max(0, _libc.syscall(CREATE_RULESET, None, 0, VERSION_FLAG))


def handled_rights(abi: int) -> int:
    """Rights over files that an ABI version knows."""
    return FIRST_RIGHTS | (REFER if abi >= 2 else 0) | (TRUNCATE if abi >= 3 else 0) | (IOCTL_DEVICE if abi >= 5 else 0)


def restrict(readable: Sequence[str], writable: Sequence[str]) -> None:
    """Allow reading and executing beneath `readable`, everything beneath `writable`, elsewhere only listing names."""
    abi = version()
    if not abi:
        return
    rights = handled_rights(abi)
    # struct landlock_ruleset_attr: file rights, network rights (none handled: the network namespace is empty), scopes
    attributes = struct.pack("<QQQ", rights, 0, SCOPES if abi >= 6 else 0)[: 24 if abi >= 6 else 16 if abi >= 4 else 8]
    ruleset = _call(CREATE_RULESET, attributes, len(attributes), 0)
    for paths, allowed in ((("/",), READ_DIR), (readable, READ), (writable, rights)):
        for path in paths:
            try:
                parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            kept = allowed & rights & (-1 if os.path.isdir(path) else ON_FILES)
            _call(ADD_RULE, ruleset, RULE_PATH_BENEATH, struct.pack("<Qi", kept, parent), 0)
            os.close(parent)
    _call(RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def _call(number: int, *arguments: int | bytes) -> int:
    done = _libc.syscall(number, *arguments)
    if done < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"Landlock system call {number}: {os.strerror(code)}")
    return done
