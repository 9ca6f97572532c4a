"""Printing of tables whose numbers stay whole: a terminal that is too narrow wraps their lines."""

from __future__ import annotations

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

_UNBOUNDED = 10_000


def print_whole(table: Table, console: Console | None = None) -> None:
    """Print a table on `console`, which is as wide as the table from then on."""
    console = console or Console(highlight=False)
    needed = Measurement.get(console, console.options.update(width=_UNBOUNDED), table).maximum
    console.width = max(console.width, needed)
    console.print(table)
