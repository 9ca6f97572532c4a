"""Views of the keys and entries that a ragged batch attends to, and its cut into tiles. Plain tensors only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dsv4.config import COMPRESSION_KINDS, PAGE_TOKENS
from dsv4.kernels.gather import take_rows


def entry_rows(block_table: np.ndarray, slots: np.ndarray | int, entries: np.ndarray, ratio: int) -> np.ndarray:
    """Pool rows of `entries` (numbers within a sequence) of the cache rows `slots`; int64 like `entries`.

    block_table int64 [cache rows, pages]: each row's pages, of PAGE_TOKENS tokens, PAGE_TOKENS / ratio entries, each.
    """
    per_page = PAGE_TOKENS // ratio
    return block_table[slots, entries // per_page] * per_page + entries % per_page


class Ragged(Protocol):
    """Sequences laid end to end, as int64 arrays [N]: new tokens, position of the first one, cache row."""

    @property
    def lengths(self) -> np.ndarray: ...
    @property
    def starts(self) -> np.ndarray: ...
    @property
    def slots(self) -> np.ndarray: ...


class StoredFormat(Protocol):
    """Format of the rows of a cache."""

    def decode(self, rows: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class StoredRows:
    """Rows of a cache, [..., columns], and their format; None: they are channels already, as those of a batch are."""

    rows: Tensor
    format: StoredFormat | None = None

    @property
    def fresh(self) -> Tensor | None:
        """The rows of a batch, which may record a gradient; None for those of a cache."""
        return self.rows if self.format is None else None

    def take(self, index: slice | Tensor) -> Tensor:
        """Channels [..., D] of the rows that a slice or an int64 tensor of any shape names."""
        rows = self.rows[index] if isinstance(index, slice) else take_rows(self.rows, index)
        return rows if self.format is None else self.format.decode(rows)


@dataclass(frozen=True)
class EntryView:
    """Compressed entries of the batch's sequences, including those that the batch closes."""

    pool: StoredRows  # [rows, D]
    ratio: int  # tokens per entry
    batch: Ragged
    block_table: np.ndarray | None  # see entry_rows; None: the entries are contiguous, sequence after sequence

    def of_sequence(self, sequence: int) -> Tensor:
        """Entries [(start + length) // ratio, D] of one sequence in order."""
        counts = (self.batch.starts + self.batch.lengths) // self.ratio
        entry = np.arange(counts[sequence])
        if self.block_table is None:
            rows = int(counts[:sequence].sum()) + entry
        else:
            rows = entry_rows(self.block_table, int(self.batch.slots[sequence]), entry, self.ratio)
        return self.pool.take(torch.from_numpy(rows).to(self.pool.rows.device))


@dataclass(frozen=True)
class KeyView:
    """Keys (also the values) of a ragged batch in one layer."""

    new: Tensor  # [T, D], of the batch's own tokens
    batch: Ragged
    ring: StoredRows | None  # [slots, 128, D], of earlier tokens: position p in row p % 128; None: no earlier tokens
    slots: Tensor  # int64 [n]: rings of the first n sequences, on the ring's device; the others have no earlier tokens
    entries: EntryView | None  # None: the layer has window keys only

    @property
    def most_chosen(self) -> int:
        """Width of a choice of which no token sees more entries, at least 1; 1 in layers without an indexer."""
        if self.entries is None or not COMPRESSION_KINDS[self.entries.ratio].has_indexer:
            return 1
        return max(1, int((self.batch.starts + self.batch.lengths).max()) // self.entries.ratio)

    @property
    def cached(self) -> bool:
        """True if earlier keys or the entries are a cache's."""
        ring, entries = self.ring, self.entries
        return (ring is not None and ring.fresh is None) or (entries is not None and entries.block_table is not None)


@dataclass(frozen=True)
class TileGroup:
    """Tiles first to last - 1, attended to in one call.

    entries: rows of the pool. Tiles of one sequence share them, int64 [num_entries] or, without a cache, a slice. Tiles
    of several sequences have their own, int64 [tiles, num_entries]. Indices past a sequence's last entry point to a row
    of zeros, never to another sequence's entry: zero times a non-finite value is not zero.
    """

    first: int
    last: int
    window_skip: int  # leading window slots before the sequence's start in every tile, a multiple of a tile
    num_entries: int  # a multiple of ENTRY_CHUNK, 0 when no row sees an entry
    entries: slice | Tensor | None
    num_visible: Tensor  # int64 [tiles, rows]: entries that each row may see
    sparse: bool  # rows may see more entries than the indexer keeps

    def visible(self, chosen: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(mask bool [tiles, rows, n] of the entries that each row reads, their numbers int64 of the same shape).

        Sparse group: the chosen entries [tiles, rows, k], -1 for none; all of them in a row that sees at most k. Other
        groups: all visible entries, n = num_entries in order, None for the numbers.
        """
        if not self.sparse:
            every = torch.arange(self.num_entries, device=self.num_visible.device)
            return every < self.num_visible.unsqueeze(-1), None
        assert chosen is not None
        k, seen = chosen.shape[-1], self.num_visible.unsqueeze(-1)
        chosen = torch.where(seen <= k, torch.arange(k, device=chosen.device), chosen)
        # A row without a token repeats another row's choice.
        mask = (chosen >= 0) & (chosen < seen)
        return mask, chosen.masked_fill(~mask, 0)


@dataclass(frozen=True)
class Tiles:
    """Cut of a ragged batch into tiles, each with rows of one sequence; the reference runs group by group.

    A tile's window slots are the same positions in the same order however the sequence was cut. Other kernels make
    their own cut and read only KeyView.
    """

    row_token: Tensor  # int64 [tiles, rows]: token of each row; a row without one repeats some token
    token_row: Tensor  # int64 [T]: tile * rows + row of each token
    in_order: bool  # rows are the tokens in order
    window_index: Tensor  # int64 [tiles, W]: row of [rings of the batch's sequences | new keys | one zero row]
    window_mask: Tensor  # bool [tiles, rows, W]
    groups: list[TileGroup]

    def rows(self, x: Tensor, group: TileGroup) -> Tensor:
        """Rows of x [T, ...] as the group's tiles hold them: [tiles, rows, ...]."""
        tiles = slice(group.first, group.last)
        if self.in_order:
            return x.view(*self.row_token.shape, *x.shape[1:])[tiles]
        return take_rows(x, self.row_token[tiles])

    def tokens(self, x: Tensor) -> Tensor:
        """Inverse of `rows`, for all tiles: x [tiles, rows, ...] -> [T, ...]."""
        return x.flatten(0, 1) if self.in_order else take_rows(x.flatten(0, 1), self.token_row)
