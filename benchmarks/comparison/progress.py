"""A bar that names what comes next."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

Advance = Callable[[str], None]  # says what comes next


@contextmanager
def progress_bar(console: Console, total: int) -> Iterator[Advance]:
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("start", total=total, completed=-1)
        yield lambda what: progress.update(task, advance=1, description=what)
