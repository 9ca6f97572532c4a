"""Listening socket of the server, bound before the model is loaded, so that a taken port is known at once."""

from __future__ import annotations

import errno
import ipaddress
import socket


class PortTakenError(OSError):
    """The address cannot be bound, most often because another process listens on it."""


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. PortTakenError names the port and a remedy; ValueError for an impossible port or host."""
    if not 0 <= port <= 65535:  # the resolver would take it modulo 65536
        raise ValueError(f"port is {port}; allowed: [0, 65535], 0 for any free port")
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:  # an over-long host label raises UnicodeError
        raise ValueError(f"host is {host!r}; allowed: a name or an address of this machine ({error})") from error
    listening = socket.socket(family, kind, protocol)
    # Else a server that was just stopped would block its port for a minute.
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(where)
        listening.listen()  # bind alone is not exclusive: two servers can bind one port before either listens
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRNOTAVAIL:
            raise ValueError(f"host is {host!r}; this machine has no such address") from error
        raise PortTakenError(
            f"cannot listen on {host} port {port}: {error.strerror}; stop what uses it or choose another with --port"
        ) from error
    return listening


def address(listening: socket.socket) -> str:
    """Base URL of a bound socket for a browser on this machine."""
    name: tuple[str, int] = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(name[0], name[0])
    return f"http://[{host}]:{name[1]}" if ":" in host else f"http://{host}:{name[1]}"


def is_loopback(listening: socket.socket) -> bool:
    """True if a bound socket is reachable from this machine only."""
    return ipaddress.ip_address(listening.getsockname()[0].partition("%")[0]).is_loopback
