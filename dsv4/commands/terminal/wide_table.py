"""Tables of names and numbers, which stay whole: a terminal that is too narrow wraps the lines."""

from __future__ import annotations

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

_UNBOUNDED = 10_000


def figures_table(*columns: str) -> Table:
    """Table for a column of names and columns of numbers."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", header_style="dim", no_wrap=True)
    return table


def sums_table(names: str, *columns: str) -> Table:
    """Table for a column of names, folded where they are long, and columns of numbers."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(names, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def print_whole(table: Table, console: Console | None = None) -> None:
    """Print a table on `console`, which is as wide as the table from then on."""
    console = console or Console(highlight=False)
    needed = Measurement.get(console, console.options.update(width=_UNBOUNDED), table).maximum
    console.width = max(console.width, needed)
    console.print(table)
