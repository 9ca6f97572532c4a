"""Options of `dsv4 serve` that say who may use the server, and for how long. Imports nothing that takes time."""

from __future__ import annotations

import argparse

from dsv4.server.run import CLIENT_SECONDS, GRACE_SECONDS


def add_access_options(parser: argparse.ArgumentParser) -> None:
    """Options of `serve` that say who may use it and for how long."""
    access = parser.add_argument_group("who may use it, and for how long")
    access.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help="require one of these keys; repeatable. Every process of this machine can read it here: better the "
        "environment variable DSV4_API_KEY (comma-separated) or --api-key-file",
    )
    access.add_argument(
        "--api-key-file", metavar="FILE", help="require one of the keys in FILE, one a line, # comments"
    )
    access.add_argument(
        "--allowed-host", action="append", default=[], metavar="NAME", help="a further name of this server; repeatable"
    )
    access.add_argument(
        "--allowed-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="web pages of this origin, like https://chat.example, may use the server; repeatable",
    )
    access.add_argument(
        "--grace-seconds",
        type=float,
        default=GRACE_SECONDS,
        metavar="S",
        help="what open requests get to end after SIGTERM or Ctrl-C (default: %(default)g)",
    )
    access.add_argument(
        "--client-seconds",
        type=float,
        default=CLIENT_SECONDS,
        metavar="S",
        help="how long a client may take to send a request, or not read its answer (default: %(default)g)",
    )
    access.add_argument(
        "--max-connections",
        type=int,
        default=None,
        metavar="N",
        help="connections open at once (default: what the limit of open files leaves, at most 4096)",
    )
