"""The cache of one model: a fixed state a sequence, and pages of 128 tokens.

State of a sequence and layer: the window ring (last 128 tokens, slot = position mod 128) and, for each compressor, the
projected rows of the windows that are still needed (fp32, ape added to the scores): the last 2 * ratio tokens with
overlap, the last ratio tokens without; slot = position mod that number.
Pages: a page covers 128 tokens of one sequence in every layer: 32 CSA entries with 32 index keys, or one HCA entry.
The pages of a sequence lie next to each other, so that its entries can be read as one slice.

On the CPU the system hands memory out as it is written, so that every row has all its pages from the start. Elsewhere a
row gets pages as its tokens come, at least twice as many each time, and all entries then move to larger tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv4.config import ModelConfig
from dsv4.kernels.attention import ENTRY_CHUNK
from dsv4.model.batch import RaggedBatch

PAGE_TOKENS = 128
# Pages that a growing row gets at a time: so many HCA entries, one a page, are read at once, and none is another row's.
GROWTH_PAGES = ENTRY_CHUNK


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros whose memory the system hands out when it is first written: a long context costs what it holds."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    raw = np.zeros(int(np.prod(shape)) * dtype.itemsize, dtype=np.uint8)
    with torch.inference_mode(False):  # a tensor of inference mode would not count the writes to it
        return torch.from_numpy(raw).view(dtype).view(shape)


@dataclass
class CompressorState:
    """Rows a compressor still needs, and entries it made. kv, score: fp32 [slots, rows, width]; entries [rows, D]."""

    ratio: int
    kv: Tensor
    score: Tensor
    entries: Tensor

    @property
    def rows(self) -> int:
        return self.kv.shape[1]


@dataclass
class LayerCache:
    """One layer: window [slots, 128, head_dim], and the compressors' state where the layer has them."""

    window: Tensor
    main: CompressorState | None = None
    index: CompressorState | None = None

    def compressors(self) -> list[CompressorState]:
        return [c for c in (self.main, self.index) if c is not None]


@dataclass
class Snapshot:
    """State of one sequence: its length, and per layer its window and compressor rows. Entries stay in place."""

    length: int
    tensors: list[Tensor] = field(default_factory=list)


class Cache:
    """State and pages of `batch_size` sequences of up to `max_tokens` tokens each.

    `grows`: rows get their pages as tokens come; by default where the device is not the CPU. The native kernels take
    only a cache that does not grow.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_tokens: int,
        device: torch.device,
        dtype: torch.dtype,
        grows: bool | None = None,
    ) -> None:
        if batch_size < 1 or max_tokens < 1:
            raise ValueError(f"new_cache: batch_size {batch_size} and max_tokens {max_tokens} must be at least 1")
        self.config, self.batch_size, self.max_tokens = config, batch_size, max_tokens
        self.lengths: list[int] = [0] * batch_size
        self.pages_per_slot = -(-max_tokens // PAGE_TOKENS)
        self.grows = device.type != "cpu" if grows is None else grows
        self.num_pages = self._lay_out(np.full(batch_size, 0 if self.grows else self.pages_per_slot))
        self.native: Any = None  # these tensors as the native kernels see them, made when first asked for
        self.layers: list[LayerCache] = []
        for ratio in config.compress_ratios:
            layer = LayerCache(
                torch.zeros(batch_size, config.sliding_window, config.head_dim, dtype=dtype, device=device)
            )
            if ratio:
                layer.main = self._compressor(ratio, config.head_dim, dtype, device)
            if ratio == 4:
                layer.index = self._compressor(ratio, config.index_head_dim, dtype, device)
            self.layers.append(layer)

    def _lay_out(self, pages: np.ndarray) -> int:
        """Give each row its number of pages, one row's after the other's. Returns how many they are."""
        self.row_pages = pages
        first = np.cumsum(pages) - pages
        place = np.arange(self.pages_per_slot)
        self.block_table = np.where(place < pages[:, None], first[:, None] + place, -1)
        return int(pages.sum())

    def _entries(self, ratio: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        # A chunk of slack: entries are read in fixed chunks, and the last one may reach past the last page.
        return _lazy_zeros((self.num_entry_rows(ratio) + ENTRY_CHUNK, width), dtype, device)

    def _compressor(self, ratio: int, width: int, dtype: torch.dtype, device: torch.device) -> CompressorState:
        overlap = 2 if ratio == 4 else 1
        shape = (self.batch_size, overlap * ratio, overlap * width)
        entries = self._entries(ratio, width, dtype, device)
        return CompressorState(
            ratio,
            torch.zeros(shape, dtype=torch.float32, device=device),
            torch.full(shape, float("-inf"), dtype=torch.float32, device=device),
            entries,
        )

    def entry_rows(self, slot: int, ratio: int, start: int, stop: int) -> np.ndarray:
        """Rows of entries start..stop-1 of a slot in the entry tensors of a layer with this ratio."""
        per_page = PAGE_TOKENS // ratio
        i = np.arange(start, stop)
        return self.block_table[slot, i // per_page] * per_page + i % per_page

    def num_entry_rows(self, ratio: int) -> int:
        """Rows of the entry tensors of this ratio, all pages together; behind them lie rows of zeros."""
        return self.num_pages * (PAGE_TOKENS // ratio)

    def last_entry_row(self, slot: int, ratio: int) -> int:
        """Row of the last entry that a slot has pages for."""
        count = int(self.row_pages[slot]) * (PAGE_TOKENS // ratio)
        return int(self.entry_rows(slot, ratio, count - 1, count)[0])

    def reserve(self, slot: int, new_tokens: int) -> None:
        """Check that a slot can take new_tokens more; ValueError says how many it holds and may hold."""
        if not 0 <= slot < self.batch_size:
            raise ValueError(f"cache row {slot}: the cache has rows 0 to {self.batch_size - 1}")
        if self.lengths[slot] + new_tokens > self.max_tokens:
            raise ValueError(
                f"cache row {slot} holds {self.lengths[slot]} tokens and cannot take {new_tokens} more: "
                f"max_tokens is {self.max_tokens}"
            )

    def check(self, batch: RaggedBatch) -> None:
        """ValueError unless every sequence starts where its row ends, and the row has room and is its alone.

        The rows of a growing cache then have the pages for it.
        """
        batch.check_slots()
        slots, starts, lengths = batch.slots.tolist(), batch.starts.tolist(), batch.lengths.tolist()
        for slot, start, length in zip(slots, starts, lengths, strict=True):
            self.reserve(slot, length)
            if self.lengths[slot] != start:
                raise ValueError(f"cache row {slot} holds {self.lengths[slot]} tokens, the batch starts at {start}")
        if self.grows:
            self._grow(batch.slots, -(-(batch.starts + batch.lengths) // PAGE_TOKENS))

    def _grow(self, slots: np.ndarray, needed: np.ndarray) -> None:
        """Give rows at least the pages that they need; rows that hold nothing lose theirs to them."""
        short = needed > self.row_pages[slots]
        if not short.any():
            return
        old_pages, old_first = self.row_pages, self.block_table[:, 0]
        holding = np.array(self.lengths) > 0
        pages = np.where(holding, old_pages, 0)
        pages[slots] = old_pages[slots]
        grown = np.maximum(needed, 2 * old_pages[slots])
        grown = np.minimum(-(-grown // GROWTH_PAGES) * GROWTH_PAGES, self.pages_per_slot)
        pages[slots[short]] = grown[short]
        self.num_pages = self._lay_out(pages)
        self.native = None
        rows = [(int(old_first[s]), int(self.block_table[s, 0]), int(old_pages[s])) for s in np.nonzero(holding)[0]]
        for layer in self.layers:
            for state in layer.compressors():
                self._move(state, rows)

    def _move(self, state: CompressorState, rows: list[tuple[int, int, int]]) -> None:
        """New entry tensor of a compressor; rows: (old first page, new first page, pages) of what is kept."""
        old, per_page = state.entries, PAGE_TOKENS // state.ratio
        with torch.inference_mode(False):  # a tensor of inference mode could not be written outside it
            new = self._entries(state.ratio, old.shape[1], old.dtype, old.device)
            for start, to, count in rows:
                new[to * per_page : (to + count) * per_page] = old[start * per_page : (start + count) * per_page]
        state.entries = new

    def count(self, batch: RaggedBatch) -> None:
        """The rows hold the batch's tokens from now on."""
        for slot, length in zip(batch.slots.tolist(), batch.lengths.tolist(), strict=True):
            self.lengths[slot] += length

    def reset(self, slot: int) -> None:
        """Forget a sequence: its state, and what it wrote to its pages."""
        length, self.lengths[slot] = self.lengths[slot], 0
        for layer in self.layers:
            layer.window[slot] = 0
            for state in layer.compressors():
                state.kv[slot] = 0
                state.score[slot] = float("-inf")
                state.entries[self.entry_rows(slot, state.ratio, 0, length // state.ratio)] = 0

    def snapshot(self, slot: int) -> Snapshot:
        """Copy the state of a sequence: enough to return to this length later, as its entries stay in their pages."""
        snap = Snapshot(self.lengths[slot])
        for layer in self.layers:
            snap.tensors.append(layer.window[slot].clone())
            for state in layer.compressors():
                snap.tensors += [state.kv[slot].clone(), state.score[slot].clone()]
        return snap

    def restore(self, slot: int, snap: Snapshot) -> None:
        """Put a sequence back to a snapshot taken of this slot; entries made since are overwritten as it goes on."""
        self.lengths[slot] = snap.length
        tensors = iter(snap.tensors)
        for layer in self.layers:
            layer.window[slot] = next(tensors)
            for state in layer.compressors():
                state.kv[slot] = next(tensors)
                state.score[slot] = next(tensors)

    def num_bytes(self) -> dict[str, int]:
        """Bytes by component: window, compressor state, entries, index keys, slack rows with them.

        Entries and index keys are those of full sequences; in a cache that grows, of the pages that there are.
        """
        total = {"window": 0, "state": 0, "entries": 0, "index_keys": 0}
        for layer in self.layers:
            total["window"] += layer.window.nbytes
            for state in layer.compressors():
                total["state"] += state.kv.nbytes + state.score.nbytes
            if layer.main is not None:
                total["entries"] += layer.main.entries.nbytes
            if layer.index is not None:
                total["index_keys"] += layer.index.entries.nbytes
        return total
