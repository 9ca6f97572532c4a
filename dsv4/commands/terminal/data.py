"""Tokenizing with a progress bar, and the table of a folder of shards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from dsv4.data.records import find_sources
from dsv4.data.shards import Counts, Index, ShardFolder
from dsv4.data.tokenizing import ShardWriter
from dsv4.hub import fetch_settings, hub_name
from dsv4.model_folder import resolve_model


def tokenize(sources: Sequence[str], model: str | None, out: Path, column: str | None, shard_tokens: int) -> None:
    """Tokenize sources into `out` with the tokenizer of `model`."""
    name = None if model is None else hub_name(model)
    folder = resolve_model(model) if name is None else fetch_settings(name)  # no weights for a tokenizer
    found = find_sources(sources, column)
    columns = (
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("reading", total=None)
        writer = ShardWriter(found, folder, out, shard_tokens)
        index = writer.run(
            lambda source, done, total: bar.update(task, description=source[-40:], completed=done, total=total or None)
        )
    _print(out, index)


def inspect(folder: Path) -> None:
    """Check every shard of a folder and print its counts."""
    _print(folder, ShardFolder(folder).index)


def _print(folder: Path, index: Index) -> None:
    table = Table("shard", "documents", "tokens", "targets", "text bytes", "file bytes")
    for entry in index.shards:
        table.add_row(entry.name, *_cells(entry.counts), f"{entry.size:,}")
    table.add_section()
    table.add_row("all", *_cells(index.counts), f"{sum(entry.size for entry in index.shards):,}")
    console = Console()
    console.print(table)
    console.print(
        f"{folder}: {len(index.sources)} sources, {index.dtype} ids of a vocabulary of {index.vocab_size:,}, "
        f"tokenizer {index.tokenizer_sha256[:12]}, data {index.fingerprint[:12]}",
        highlight=False,
        soft_wrap=True,
    )


def _cells(counts: Counts) -> tuple[str, ...]:
    return tuple(f"{value:,}" for value in (counts.documents, counts.tokens, counts.targets, counts.text_bytes))
