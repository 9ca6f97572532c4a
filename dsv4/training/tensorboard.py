"""Metrics for TensorBoard, by tensorboardX or PyTorch's writer, whichever is installed."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Protocol

from dsv4.notices import warn_once

WRITERS = ("tensorboardX", "torch.utils.tensorboard")
GROUPS = {
    "loss": ("loss", "mtp_loss", "balance_loss", "indexer_loss", "accuracy"),
    "training": ("lr", "grad_norm", "imbalance", "tokens"),
    "speed": ("tokens_per_second", "flops_per_second", "mfu", "peak_memory_bytes"),
}


class Writer(Protocol):
    """The part of a SummaryWriter that is used here."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int, /) -> Any: ...
    def close(self) -> None: ...


def open_writer(folder: Path, first_step: int) -> Writer | None:
    """Writer of event files in `folder`, which hides what a killed run wrote from `first_step` on.

    None, said once, if no library that writes them is installed.
    """
    for name in WRITERS:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        return module.SummaryWriter(str(folder), purge_step=first_step)
    warn_once(f"no TensorBoard files are written: none of {', '.join(WRITERS)} is installed (pip install tensorboardX)")
    return None


def write_metrics(writer: Writer, metrics: dict[str, Any]) -> None:
    """Write one step's metrics."""
    for group, names in GROUPS.items():
        for name in names:
            if name in metrics:
                writer.add_scalar(f"{group}/{name}", metrics[name], metrics["step"])
