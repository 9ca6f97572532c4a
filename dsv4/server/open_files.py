"""Limit of open files, and the number of connections that fit within it."""

from __future__ import annotations

import os
import sys

if sys.platform != "win32":
    import resource

MAX_CONNECTIONS = 4096
MIN_CONNECTIONS = 8
OVERFLOW = 16  # connections beyond the limit, answered that the server is full
RESERVED = 32 + OVERFLOW  # file descriptors for everything else: page files, pipes, refused connections
_ENOUGH = 65536  # cap: limits of a billion, set by some container runtimes, slow down every child process


def raise_limit() -> None:
    """Raises the soft limit of open files to the hard one."""
    if sys.platform == "win32":
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _ENOUGH if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def connection_bound(wanted: int | None = None) -> int:
    """Limit on open connections: `wanted`, or as many as the limit of open files leaves, at most MAX_CONNECTIONS.

    ValueError if the limit leaves fewer than `wanted`, or fewer than MIN_CONNECTIONS.
    """
    if wanted is not None and wanted < 1:
        raise ValueError(f"max_connections is {wanted}; allowed: 1 or more")
    if sys.platform == "win32":
        return wanted or MAX_CONNECTIONS
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    room = MAX_CONNECTIONS if limit == resource.RLIM_INFINITY else limit - _open_files() - RESERVED
    if room < (wanted or MIN_CONNECTIONS):
        raise ValueError(
            f"the limit of open files is {limit}, which leaves room for {max(room, 0)} connections of "
            f"{wanted or MIN_CONNECTIONS}; raise it with ulimit -n"
        )
    return wanted or min(room, MAX_CONNECTIONS)


def _open_files() -> int:
    try:
        return len(os.listdir("/dev/fd"))
    except OSError:  # no such folder on this system
        return RESERVED
