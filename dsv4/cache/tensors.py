"""Tensors of a cache: per layer a window ring, the state of each compressor, and its pool of entries.

State of a sequence and layer: the window ring (the last WINDOW tokens; slot = position mod WINDOW), and for each
compressor the projected rows of the tokens that later entries may need (fp32, ape added to the scores; slot = position
mod their number). Pool of a compressor: PAGE_TOKENS / ratio entries per page, and behind all pages one row of zeros,
the blank row, for places that are read but masked. Window keys and entries lie in a format of `formats.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dsv4.cache.formats import CacheDtype, RowFormat, index_key_format, key_format
from dsv4.config import PAGE_TOKENS, CompressionKind, ModelConfig


class EntryWatcher(Protocol):
    """Keeps something beside the entries, and is told which pages were written."""

    def forget(self, pages: Iterable[int]) -> None: ...


@dataclass
class CompressorState:
    """One compressor. kv, score fp32 [slots, tokens kept, channels]; entries [pages * entries per page + 1, columns],
    as `format` stores them."""

    kind: CompressionKind
    kv: Tensor
    score: Tensor
    entries: Tensor
    format: RowFormat
    watcher: EntryWatcher | None = None

    @property
    def ratio(self) -> int:
        return self.kind.ratio

    @property
    def entries_per_page(self) -> int:
        return PAGE_TOKENS // self.kind.ratio

    @property
    def page_bytes(self) -> int:
        return self.entries_per_page * self.entries.shape[1] * self.entries.element_size()

    def write(self, rows: Tensor, entries: Tensor) -> None:
        """Write entries [n, width] to rows [n] of the pool."""
        self.entries[rows] = self.format.encode(entries)
        if self.watcher is not None:
            self.watcher.forget(np.unique(rows.numpy() // self.entries_per_page).tolist())

    def copy_page(self, source: int, target: int) -> None:
        """Copy the entries of a page to another."""
        n = self.entries_per_page
        self.entries[target * n : (target + 1) * n] = self.entries[source * n : (source + 1) * n]
        if self.watcher is not None:
            self.watcher.forget((target,))

    def read_pages(self, pages: Sequence[int]) -> Tensor:
        """A copy of the entries of pages as they are stored, [pages * entries per page, columns], in their order."""
        return self.entries[self._rows_of(pages)]

    def write_pages(self, pages: Sequence[int], entries: Tensor) -> None:
        """Write what `read_pages` gave to other pages."""
        self.entries[self._rows_of(pages)] = entries
        if self.watcher is not None:
            self.watcher.forget(pages)

    def _rows_of(self, pages: Sequence[int]) -> Tensor:
        n = self.entries_per_page
        rows = np.asarray(pages, dtype=np.int64)[:, None] * n + np.arange(n)
        return torch.from_numpy(rows.reshape(-1)).to(self.entries.device)

    def grow(self, num_pages: int) -> None:
        """Move the entries to a tensor of more pages. Page numbers stay."""
        old = self.entries
        self.entries = _pool(self.kind, num_pages, self.format, old.device)
        self.entries[: old.shape[0]] = old  # the old blank row is zeros, as a page is that was never used
        self.watcher = None

    def reset(self, slot: int) -> None:
        self.kv[slot] = 0
        self.score[slot] = float("-inf")


@dataclass
class LayerCache:
    """One layer: window [slots, WINDOW, columns], as `format` stores it, and the compressors that the layer has."""

    window: Tensor
    format: RowFormat
    main: CompressorState | None = None
    index: CompressorState | None = None

    def compressors(self) -> list[CompressorState]:
        return [c for c in (self.main, self.index) if c is not None]

    def rings(self) -> list[Tensor]:
        """Tensors [slots, size, ...] that hold position p of a sequence in row p % size."""
        return [self.window, *(t for c in self.compressors() for t in (c.kv, c.score))]

    def tensors(self) -> list[Tensor]:
        """Window, then kv, score and entries of each compressor."""
        return [self.window, *(t for c in self.compressors() for t in (c.kv, c.score, c.entries))]

    def native_tensors(self) -> list[Tensor]:
        """As `tensors`, stored rows as their bytes."""
        parts = [t for c in self.compressors() for t in (c.kv, c.score, c.entries.view(torch.uint8))]
        return [self.window.view(torch.uint8), *parts]

    def write_window(self, rows: Tensor, keys: Tensor) -> None:
        """Write keys [n, width] to rows [n] of all slots' rings, laid end to end."""
        self.window.flatten(0, 1)[rows] = self.format.encode(keys)

    def reset(self, slot: int) -> None:
        """Forget the state of a slot. What it wrote to pages stays there."""
        self.window[slot] = 0
        for compressor in self.compressors():
            compressor.reset(slot)


def new_layer(
    config: ModelConfig, kind: CompressionKind, slots: int, num_pages: int, device: torch.device, dtype: CacheDtype
) -> LayerCache:
    """Empty tensors of a layer: state of `slots` sequences, and `num_pages` pages."""

    def compressor(rows: RowFormat) -> CompressorState:
        shape = (slots, kind.state_tokens, kind.channels(rows.width))
        kv = torch.zeros(shape, dtype=torch.float32, device=device)
        score = torch.full(shape, float("-inf"), dtype=torch.float32, device=device)
        return CompressorState(kind, kv, score, _pool(kind, num_pages, rows, device), rows)

    keys = key_format(config, dtype)
    return LayerCache(
        torch.zeros(slots, config.sliding_window, keys.columns, dtype=keys.dtype, device=device),
        keys,
        compressor(keys) if kind.ratio else None,
        compressor(index_key_format(config, dtype)) if kind.has_indexer else None,
    )


def num_bytes(layers: list[LayerCache]) -> dict[str, int]:
    """Bytes of the tensors by component: window, state, entries, index_keys."""
    total = {"window": 0, "state": 0, "entries": 0, "index_keys": 0}
    for layer in layers:
        total["window"] += layer.window.nbytes
        total["state"] += sum(c.kv.nbytes + c.score.nbytes for c in layer.compressors())
        total["entries"] += layer.main.entries.nbytes if layer.main is not None else 0
        total["index_keys"] += layer.index.entries.nbytes if layer.index is not None else 0
    return total


def _pool(kind: CompressionKind, num_pages: int, rows: RowFormat, device: torch.device) -> Tensor:
    """Entries of `num_pages` pages and the blank row, zeros."""
    shape = (num_pages * (PAGE_TOKENS // kind.ratio) + 1, rows.columns)
    if device.type != "cpu":
        return torch.zeros(shape, dtype=rows.dtype, device=device)
    # The system hands memory of NumPy's zeros out when it is first written: a long context costs what it holds.
    raw = np.zeros(shape[0] * shape[1] * rows.dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(raw).view(rows.dtype).view(shape)
