"""Origin policy: checks a browser's Host and Origin headers before anything else, to restrict which pages have access.

A page of any site can make its visitor's browser send requests to a server on that machine or network. Two headers
reveal such requests, and no page can forge them:

Origin  the site of the page. Only the server's own pages pass, and those that the operator lists.
Host    the name under which the browser found the server. A site that points its own name at this machine (DNS
        rebinding) is of the same origin as far as the browser can tell, but the name is still not the server's.

Programs other than browsers send no Origin. A server on a loopback address accepts loopback names only, from pages and
programs. On another address it may have names unknown to it, so programs may use any name. Pages may use a name that
no stranger can point at the server (an address, this machine's name, a listed name), or any name if requests need a
key, which a stranger's page does not have.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from dataclasses import dataclass, field

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from dsv4.server.error_responses import error_response
from dsv4.server.errors import RequestError
from dsv4.server.web import STATIC_PATH

ANY = "*"
_DEFAULT_PORTS = {"http": 80, "https": 443}
_READING = ("GET", "HEAD", "OPTIONS")
_HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[^:/?#@\[\]\s]+)(?::(?P<port>\d{1,5}))?", re.IGNORECASE)


@dataclass(frozen=True)
class OriginPolicy:
    """Hosts and origins that requests may name.

    `allowed_hosts` and `allowed_origins` extend the server's own; "*" in either disables its check.
    """

    bound_host: str = "127.0.0.1"  # as configured
    loopback: bool = True  # True if the listening address is reachable from this machine only
    needs_key: bool = False
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    own_names: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        """Raises ValueError for a host that is no name or address, or an origin that is no scheme://host[:port]."""
        hosts = [_checked_host(host) for host in self.allowed_hosts if host != ANY]
        for origin in self.allowed_origins:
            if origin not in (ANY, "null") and not _is_origin(origin):
                raise ValueError(f"allowed origin is {origin!r}; allowed: scheme://host[:port], null, or * for any")
        machine = [] if self.loopback else [name := socket.gethostname().lower(), f"{name}.local"]
        object.__setattr__(self, "own_names", frozenset([self.bound_host.lower().strip("[]"), *machine, *hosts]))

    def host_error(self, host: str | None) -> str | None:
        """Message about a disallowed Host header, None if it is allowed."""
        if host is None or not self.loopback or ANY in self.allowed_hosts:  # without Host: HTTP/1.0, no browser
            return None
        name, _ = split_host(host)
        if name is not None and (is_loopback(name) or name in self.own_names):
            return None
        names = ", ".join(sorted({"localhost", "127.0.0.1", "[::1]"} | self.own_names))
        return f"Host is {host!r}; this server answers to {names}. Allow another name with --allowed-host"

    def origin_error(self, origin: str, host: str | None) -> str | None:
        """Message about an Origin header that is disallowed with this Host header, None if it is allowed."""
        if ANY in self.allowed_origins or origin in self.allowed_origins:
            return None
        if host is not None and self._is_own_page(origin, host):
            return None
        return (
            f"Origin is {origin!r}, and Host is {host!r}; only pages of this server may use it. Allow the pages of "
            "another origin with --allowed-origin, another name of this server with --allowed-host"
        )

    def _is_own_page(self, origin: str, host: str) -> bool:
        """True for this server's own origin: the name and port of `host`, or another loopback name on the same port."""
        scheme, _, rest = origin.lower().partition("://")
        (name, port), (own_name, own_port) = split_host(rest), split_host(host)
        default = _DEFAULT_PORTS.get(scheme)  # by the page's scheme, as a proxy may terminate TLS
        if name is None or own_name is None or default is None or (port or default) != (own_port or default):
            return False
        return (name == own_name and self._is_own(name)) or (is_loopback(name) and is_loopback(own_name))

    def _is_own(self, name: str) -> bool:
        """True unless a stranger may have pointed the name at this server."""
        known = is_loopback(name) or _is_address(name) or name in self.own_names
        return known or self.loopback or self.needs_key or ANY in self.allowed_hosts


class OriginMiddleware:
    """Answers 403 to requests that the policy refuses."""

    def __init__(self, app: ASGIApp, policy: OriginPolicy) -> None:
        self.app = app
        self.policy = policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (message := self._error(scope)) is not None:
            await error_response(RequestError(403, message), scope["path"])(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _error(self, scope: Scope) -> str | None:
        headers = Headers(scope=scope)
        host, origin = headers.get("host"), headers.get("origin")
        if (message := self.policy.host_error(host)) is not None:
            return message
        if origin == "null" and scope["method"] in _READING and scope["path"].startswith(f"{STATIC_PATH}/"):
            return None  # public files; the page's sandboxed frame has no other origin
        if origin is not None:
            return self.policy.origin_error(origin, host)
        site = headers.get("sec-fetch-site", "none")
        if scope["method"] not in _READING and site not in ("none", "same-origin"):
            return f"Sec-Fetch-Site is {site!r} and there is no Origin; only pages of this server may use it"
        return None


def split_host(host: str) -> tuple[str | None, int | None]:
    """Split a Host header -> (name in lower case without brackets, port); None for a missing or invalid part."""
    match = _HOST.fullmatch(host.strip())
    if match is None:
        return None, None
    port = match["port"]
    return match["name"].lower().strip("[]").rstrip("."), None if port is None else int(port)


def is_loopback(name: str) -> bool:
    """True for names and addresses that always resolve to the local machine."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    return _is_address(name) and ipaddress.ip_address(name).is_loopback


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _checked_host(host: str) -> str:
    name, port = split_host(f"[{host}]" if host.count(":") > 1 and not host.startswith("[") else host)
    if name is None or port is not None:
        raise ValueError(
            f"allowed host is {host!r}; allowed: a name or an address, without scheme and port, or * for any"
        )
    return name


def _is_origin(origin: str) -> bool:
    return re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#\s]*", origin) is not None
