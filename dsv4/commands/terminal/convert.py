"""`dsv4 convert`: rewrites a checkpoint, with a progress bar in a terminal."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from dsv4.checkpoint.gguf_export import export_gguf
from dsv4.checkpoint.writing import Format, convert


def convert_checkpoint(
    src: str | Path,
    dst: str,
    format: str,
    *,
    overwrite: bool,
    allow_rounding: bool,
    linears: Any,
    mtp: bool,
    adapter: str | None,
) -> None:
    """Writes `dst` and prints its size and the rounding errors.

    ValueError for linears or mtp without gguf, and for an adapter with it.
    """
    if format == "gguf" and adapter is not None:
        raise ValueError(
            "--adapter is not allowed with --format gguf; allowed: to merge into a folder, and convert that"
        )
    if format != "gguf" and (linears is not None or mtp):
        raise ValueError(f"--linears and --mtp are not allowed with --format {format}; allowed: gguf")
    console, started = Console(stderr=True), time.monotonic()
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    written = 0
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def show(done: int, total: int) -> None:
            nonlocal written
            written = total
            bar.update(task, completed=done, total=total)

        options: dict[str, Any] = {"overwrite": overwrite, "allow_rounding": allow_rounding, "progress": show}
        if format == "gguf":
            errors = export_gguf(src, dst, linears=linears, mtp=mtp, **options)
        else:
            errors = convert(src, dst, cast(Format, format), adapter=adapter, **options)
    what = "the MTP block, " if mtp else ""
    print(f"{Path(dst)}: {what}{format}, {decimal(written)} of tensors in {time.monotonic() - started:.1f} s")
    for kind, error in errors.items():
        print(f"rounded {error.tensors} tensors of {kind}: {error}, in {error.worst_tensor}")
