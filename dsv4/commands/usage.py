"""`dsv4 usage`: what a server's requests used, by key, user, model or day, and what they would have cost."""

from __future__ import annotations

import argparse
from typing import Any

from dsv4.commands.options import add_command


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "usage",
        run,
        "sum up the usage that dsv4 serve --usage-db recorded, with its cost at DeepSeek's prices",
        "dsv4 usage usage.db\ndsv4 usage usage.db --by user --since 2026-11-01\n"
        "dsv4 usage usage.db --by request --csv\ndsv4 usage postgresql://host/name --by key",
    )
    parser.add_argument("place", metavar="FILE_OR_URL", help="the database that dsv4 serve --usage-db writes")
    parser.add_argument(
        "--by",
        choices=("key", "user", "model", "day", "request"),
        default="day",
        help="one row per API key, user, model, day (UTC) or request (default: %(default)s)",
    )
    parser.add_argument("--since", metavar="TIME", help="from this day or time on, UTC, like 2026-11-28 or ...T09:00")
    parser.add_argument("--until", metavar="TIME", help="before this day or time")
    parser.add_argument("--csv", action="store_true", help="CSV instead of a table")
    parser.add_argument(
        "--price-as", metavar="MODEL", help="cost of all requests at the prices of this model, like deepseek-v4-pro"
    )


def run(options: argparse.Namespace) -> None:
    from dsv4.commands.terminal.usage import print_usage

    print_usage(options.place, options.by, options.since, options.until, options.csv, options.price_as)
