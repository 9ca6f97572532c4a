"""State of the MTP block per row: how far it has read, and the main model's streams that it has yet to read.

The block's entry at position t needs the streams of t and the token at t + 1: it lags one token behind the main model.
Its keys lie in the window of its layer, as any layer's. They follow from its inputs at their own positions alone, and
only the last WINDOW are ever seen: it need not read at once, nor what lies further back.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv4.cache.rollback import ring_spans
from dsv4.cache.tensors import LayerCache
from dsv4.config import WINDOW, ModelConfig


class MTPState:
    """Streams of the last WINDOW tokens of each row, and the number of entries that the block has read."""

    def __init__(
        self, config: ModelConfig, layers: list[LayerCache], slots: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.layers = layers  # of the MTP blocks
        self.ends = [0] * slots  # tokens of each row when streams were last stored: of later ones there are none
        self.read = [0] * slots  # entries 0 to read - 1 of a row are written, those that its window still holds
        shape = (slots * WINDOW, config.hc_mult, config.hidden_size)
        with torch.inference_mode(False):
            self.streams = torch.zeros(shape, device=device, dtype=dtype)

    @property
    def row_bytes(self) -> int:
        """Bytes of the streams of a row."""
        return self.streams.nbytes // len(self.ends)

    def rows(self, slots: np.ndarray | int, positions: np.ndarray) -> Tensor:
        """Rows of `streams` where positions [n] of slots lie, int64 [n]."""
        return torch.from_numpy(slots * WINDOW + positions % WINDOW).to(self.streams.device)

    def store(self, slot: int, start: int, streams: Tensor) -> None:
        """Keep the streams [n, hc_mult, d] of a row's tokens from position `start` on; n is WINDOW at most."""
        # NumPy's assignments take a fraction of torch's time, and a step of a small model is over in 0.3 ms.
        held, given = _rows(self.streams), _rows(streams.to(self.streams.dtype))
        for offset, rows in ring_spans(start, len(streams), WINDOW):
            first = slot * WINDOW + rows.start
            count = rows.stop - rows.start
            held[first : first + count] = given[offset : offset + count]
        self.ends[slot] = start + len(streams)

    def pending(self, slot: int, length: int) -> Tensor | None:
        """Streams [hc_mult, d] of the last of a row's tokens, where all before it are read; else None."""
        if not 0 < length <= self.read[slot] + 1 or self.ends[slot] != length:
            return None
        return self.streams[slot * WINDOW + (length - 1) % WINDOW]

    def restore(self, slot: int, length: int, pending: Tensor | None) -> None:
        """Begin after `length` tokens, from what `pending` gave; None: with an empty window, as nothing was read."""
        if pending is None or not length:
            self.restart(slot, length)
            return
        if pending.shape != self.streams.shape[1:]:
            shapes = f"{list(pending.shape)}, in this cache {list(self.streams.shape[1:])}"
            raise ValueError(f"snapshot of another model: mtp.streams is {shapes}")
        self.streams[slot * WINDOW + (length - 1) % WINDOW] = pending
        self.read[slot], self.ends[slot] = length - 1, length

    def restart(self, slot: int, length: int) -> None:
        """Begin after `length` tokens that the block has not read: drafts are worse until WINDOW more have come."""
        self.read[slot] = self.ends[slot] = length
        for layer in self.layers:
            layer.window[slot] = 0


def _rows(streams: Tensor) -> Any:
    """Streams [n, hc_mult, d] as bytes in NumPy, which knows no BF16; off the CPU the tensor itself."""
    return streams.contiguous().view(torch.uint8).numpy() if streams.is_cpu else streams
