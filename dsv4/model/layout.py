"""Where everything of a ragged batch lies: tiles, windows, compression windows, visible entries. Index arithmetic only.

A tile is a block of TILE positions of one sequence, aligned to multiples of TILE, with the rows of it that are in this
batch. Its keys are always the same TILE + 128 positions in the same order, whatever was cut where: a query's sums then
run in the same order in a whole prefill, in chunks, in a decode step and in a packed training row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from dsv4.kernels.attention import ENTRY_CHUNK, TileGroup, Tiles
from dsv4.kernels.attention.views import WINDOW
from dsv4.model.batch import RaggedBatch, token_positions
from dsv4.model.cache import Cache

TILE = 64


@dataclass(frozen=True)
class CompressionLayout:
    """One ratio's compression windows that close in this batch. Sources index [state rows | new tokens | one pad]."""

    ratio: int
    source: Tensor  # int64 [windows, span]; span = ratio, or 2 * ratio with overlap (previous window first)
    entry_position: Tensor  # int64 [windows]: rope position, the first token of the entry's own window
    entry_row: Tensor  # int64 [windows]: where the entry goes
    state_row: Tensor  # int64 [k]: state rows to write, with
    state_token: Tensor  # int64 [k]: the tokens that they come from
    state_slots: Tensor  # int64 [N]


class Layout:
    """Index tables of one forward, built on the CPU once and shared by all layers."""

    def __init__(self, batch: RaggedBatch, cache: Cache | None, device: torch.device) -> None:
        self.batch, self.cache, self.device = batch, cache, device
        self.lengths, self.starts = batch.lengths, batch.starts
        self.ends = self.starts + self.lengths
        self.cu = np.cumsum(self.lengths) - self.lengths
        self.seq, self.position = token_positions(self.lengths, self.starts)
        self._compression: dict[int, CompressionLayout] = {}
        self._groups: dict[tuple[int, int, int], list[TileGroup]] = {}
        self._build_tiles()

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    @cached_property
    def positions(self) -> Tensor:
        """int64 [T]: position of each token in its sequence."""
        return self._tensor(self.position)

    @cached_property
    def sequence_ids(self) -> Tensor:
        """int64 [T]: sequence of each token."""
        return self._tensor(self.seq)

    @cached_property
    def slots(self) -> Tensor:
        """int64 [N]: cache row of each sequence."""
        return self._tensor(self.batch.slots)

    def _build_tiles(self) -> None:
        first_block, last_block = self.starts // TILE, (self.ends - 1) // TILE
        per_seq = last_block - first_block + 1
        self.tile_seq = np.repeat(np.arange(len(per_seq)), per_seq)
        base = np.cumsum(per_seq) - per_seq
        self.tile_block = np.arange(len(self.tile_seq)) - base[self.tile_seq] + first_block[self.tile_seq]
        # Tiles at the start of a sequence have a shorter window: keep them together, so that a group can leave it out.
        order = np.argsort(np.minimum(self.tile_block, WINDOW // TILE), kind="stable")
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        self.tile_seq, self.tile_block = self.tile_seq[order], self.tile_block[order]
        tile_start = np.maximum(self.starts[self.tile_seq], self.tile_block * TILE)
        tile_end = np.minimum(self.ends[self.tile_seq], (self.tile_block + 1) * TILE)
        self.num_tiles, self.num_rows = len(self.tile_seq), int((tile_end - tile_start).max())
        token_tile = rank[base[self.seq] + self.position // TILE - first_block[self.seq]]
        token_row = self.position - tile_start[token_tile]
        self.tile_end = tile_end
        row = np.arange(self.num_rows)
        # Rows that hold no token get position -1: they see nothing and come out as zeros.
        self.row_position = np.where(row < (tile_end - tile_start)[:, None], tile_start[:, None] + row, -1)
        tile_first_token = self.cu[self.tile_seq] + tile_start - self.starts[self.tile_seq]
        # In a decode step, or a chunk of whole tiles, tile rows are the tokens in their order.
        self.in_order = len(self.seq) == self.num_tiles * self.num_rows and bool((order == np.arange(len(order))).all())
        row_token = np.where(self.row_position >= 0, tile_first_token[:, None] + row, 0)
        self.row_token = self._tensor(row_token)  # pad rows repeat token 0: nobody reads their output
        self.token_row = self._tensor(token_tile * self.num_rows + token_row)

        key = self.tile_block[:, None] * TILE - WINDOW + np.arange(TILE + WINDOW)
        start, end = self.starts[self.tile_seq][:, None], self.ends[self.tile_seq][:, None]
        ring_rows = WINDOW * len(self.lengths) if self.cache is not None else 0
        pad = ring_rows + len(self.seq)
        index = np.full(key.shape, pad)
        new = (key >= start) & (key < end)
        index = np.where(new, ring_rows + self.cu[self.tile_seq][:, None] + key - start, index)
        if self.cache is not None:
            old = (key >= 0) & (key < start) & (key >= start - WINDOW)
            index = np.where(old, self.tile_seq[:, None] * WINDOW + key % WINDOW, index)
        self.window_index = self._tensor(index)
        visible = (key[:, None] >= 0) & (key[:, None] <= self.row_position[..., None])
        visible &= key[:, None] > self.row_position[..., None] - WINDOW
        self.window_mask = self._tensor(visible)

    @cached_property
    def ring_write(self) -> tuple[Tensor, Tensor]:
        """(slots * 128 + ring slot [k], token [k]): the last 128 tokens of each sequence go to its window ring."""
        return self._last_rows(WINDOW)

    def _last_rows(self, rows: int) -> tuple[Tensor, Tensor]:
        keep = np.nonzero(self.position >= (self.ends - rows)[self.seq])[0]
        slot = self.batch.slots[self.seq[keep]]
        return self._tensor(slot * rows + self.position[keep] % rows), self._tensor(keep)

    def compression(self, ratio: int) -> CompressionLayout:
        """The windows of `ratio` tokens that close in this batch."""
        if ratio not in self._compression:
            self._compression[ratio] = self._build_compression(ratio)
        return self._compression[ratio]

    def _build_compression(self, ratio: int) -> CompressionLayout:
        overlap = 2 if ratio == 4 else 1
        rows = overlap * ratio
        first, last = self.starts // ratio, self.ends // ratio
        count = last - first
        seq = np.repeat(np.arange(len(count)), count)
        window = np.arange(len(seq)) - (np.cumsum(count) - count)[seq] + first[seq]
        key = (window[:, None] - (overlap - 1)) * ratio + np.arange(rows)
        state_rows = rows * len(self.lengths) if self.cache is not None else 0
        pad = state_rows + len(self.seq)
        start = self.starts[seq][:, None]
        source = np.where(key >= start, state_rows + self.cu[seq][:, None] + key - start, pad)
        if self.cache is not None:
            source = np.where((key >= 0) & (key < start), seq[:, None] * rows + key % rows, source)
            per_page = WINDOW // ratio
            page = self.cache.block_table[self.batch.slots[seq], window // per_page]
            entry_row = page * per_page + window % per_page
        else:
            entry_row = np.arange(len(seq))
        state_row, state_token = self._last_rows(rows)
        return CompressionLayout(
            ratio=ratio,
            source=self._tensor(source),
            entry_position=self._tensor(window * ratio),
            entry_row=self._tensor(entry_row),
            state_row=state_row,
            state_token=state_token,
            state_slots=self.slots,
        )

    def tiles(self, ratio: int, top_k: int, budget: int) -> Tiles:
        """Tiles in groups of at most `budget` (row, key) pairs; top_k: entries per row, 0 without an indexer."""
        key = (ratio, top_k, budget)
        if key not in self._groups:
            self._groups[key] = self._build_groups(ratio, top_k, budget)
        tables = self.row_token, self.token_row, self.in_order, self.window_index, self.window_mask
        return Tiles(*tables, self._groups[key])

    def _build_groups(self, ratio: int, top_k: int, budget: int) -> list[TileGroup]:
        seen = self.tile_end // ratio if ratio else np.zeros_like(self.tile_end)
        # A property of the tile's place, not of what this batch holds of it: any cut of the sequence decides the same.
        most = (self.tile_block + 1) * TILE // ratio if ratio else seen
        sparse = (most > top_k) if top_k else np.zeros(self.num_tiles, bool)
        padded = -(-seen // ENTRY_CHUNK) * ENTRY_CHUNK
        many = np.bincount(self.tile_seq)[self.tile_seq] >= 4  # long sequences read their entries as a shared slice
        skip = np.maximum(0, WINDOW - self.tile_block * TILE)
        groups: list[TileGroup] = []
        first = 0
        while first < self.num_tiles:
            last, widest = first + 1, int(padded[first])
            while last < self.num_tiles and sparse[last] == sparse[first] and skip[last] == skip[first]:
                same = self.tile_seq[last] == self.tile_seq[first]
                if not same and (many[first] or many[last]):
                    break
                wider = max(widest, int(padded[last]))
                if (last + 1 - first) * self.num_rows * (TILE + WINDOW + wider) > budget:
                    break
                last, widest = last + 1, wider
            groups.append(self._group(first, last, int(skip[first]), ratio, widest, seen, bool(sparse[first])))
            first = last
        return groups

    def _group(
        self, first: int, last: int, skip: int, ratio: int, width: int, seen: np.ndarray, sparse: bool
    ) -> TileGroup:
        position = self.row_position[first:last]
        visible = self._tensor((position + 1) // ratio if ratio else position * 0)
        if width == 0:
            return TileGroup(first, last, skip, 0, None, visible, sparse)
        seqs = self.tile_seq[first:last]
        names, which = np.unique(seqs, return_inverse=True)
        rows = [self._entry_rows(int(s), ratio, int(seen[first:last][seqs == s].max())) for s in names]
        if len(rows) == 1 and (np.diff(rows[0]) == 1).all():
            start = int(rows[0][0])
            if self._is_private(int(seqs[0]), start, width, ratio):
                return TileGroup(first, last, skip, width, slice(start, start + width), visible, sparse)
        # Masked places read a row of zeros, never another sequence's entry: zero times what is not finite is not zero.
        blank = self._blank_row(ratio)
        index = np.stack([np.concatenate((r, np.full(width - len(r), blank))) for r in rows])[which]
        return TileGroup(first, last, skip, width, self._tensor(index), visible, sparse)

    def _blank_row(self, ratio: int) -> int:
        """A row of the entry tensor that is always zero: the first of the slack behind all entries."""
        return self.cache.num_entry_rows(ratio) if self.cache is not None else int((self.ends // ratio).sum())

    def _is_private(self, seq: int, start: int, width: int, ratio: int) -> bool:
        """Whether rows start..start + width - 1 hold nothing of another sequence."""
        if self.cache is None:
            return True  # a forward of its own: what is not finite in it shows anyway
        last = self.cache.last_entry_row(int(self.batch.slots[seq]), ratio)
        return start + width <= last + 1 or last + 1 == self.cache.num_entry_rows(ratio)

    def _entry_rows(self, seq: int, ratio: int, count: int) -> np.ndarray:
        if self.cache is not None:
            return self.cache.entry_rows(int(self.batch.slots[seq]), ratio, 0, count)
        per_seq = self.ends // ratio
        return int((np.cumsum(per_seq) - per_seq)[seq]) + np.arange(count)
