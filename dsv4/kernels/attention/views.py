"""Views of what a ragged batch attends to, where it lies, and the cut of the batch into tiles. Plain tensors only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dsv4.kernels.gather import take_rows

WINDOW = 128  # positions that a query sees of the newest tokens, its own included
PAGE_TOKENS = 128  # of a block table's page


class Ragged(Protocol):
    """Sequences laid end to end, as int64 arrays [N]: new tokens, position of the first one, cache row."""

    @property
    def lengths(self) -> np.ndarray: ...
    @property
    def starts(self) -> np.ndarray: ...
    @property
    def slots(self) -> np.ndarray: ...


@dataclass(frozen=True)
class EntryView:
    """Compressed entries of the batch's sequences, those that the batch closes included."""

    pool: Tensor  # [rows, D]
    ratio: int  # tokens per entry
    batch: Ragged
    # int64 [slots, pages]: entry e of cache row s is pool row block_table[s, e // n] * n + e % n, with n entries per
    # page of 128 tokens. None: the entries of the sequences lie one after another.
    block_table: np.ndarray | None

    def of_sequence(self, sequence: int) -> Tensor:
        """Entries [(start + length) // ratio, D] of one sequence in order."""
        counts = (self.batch.starts + self.batch.lengths) // self.ratio
        entry = np.arange(counts[sequence])
        if self.block_table is None:
            rows = int(counts[:sequence].sum()) + entry
        else:
            per_page = PAGE_TOKENS // self.ratio
            page = self.block_table[self.batch.slots[sequence], entry // per_page]
            rows = page * per_page + entry % per_page
        return self.pool[torch.from_numpy(rows).to(self.pool.device)]


@dataclass(frozen=True)
class KeyView:
    """Keys (which are values too) of a ragged batch in a layer."""

    new: Tensor  # [T, D], of the batch's own tokens
    batch: Ragged
    ring: Tensor | None  # [slots, 128, D], of earlier tokens: position p in row p % 128; None: there are none
    slots: Tensor  # int64 [N], the batch's cache rows on the ring's device
    entries: EntryView | None  # None: the layer has window keys alone


@dataclass(frozen=True)
class TileGroup:
    """Tiles first..last-1, attended to in one call. entries: rows of the pool, a slice when contiguous."""

    first: int
    last: int
    window_skip: int  # leading window slots before the sequence's start in every tile, a multiple of a tile
    num_entries: int  # a multiple of ENTRY_CHUNK, 0 when no row sees an entry
    entries: slice | Tensor | None  # slice, or int64 [tiles, num_entries]
    num_visible: Tensor  # int64 [tiles, rows]: entries that each row may see
    sparse: bool  # rows may see more entries than the indexer keeps

    def visible(self, chosen: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Mask bool [tiles, rows, n] of what each row reads, and which entries those are, int64 of the same shape.

        Of a sparse group the chosen entries [tiles, rows, k], -1 for none; else all that are visible: n = num_entries
        in their order, index None.
        """
        if not self.sparse:
            every = torch.arange(self.num_entries, device=self.num_visible.device)
            return every < self.num_visible.unsqueeze(-1), None
        assert chosen is not None
        mask = (chosen >= 0) & (chosen < self.num_visible.unsqueeze(-1))  # a row without a token repeats another's
        return mask, chosen.masked_fill(~mask, 0)


@dataclass(frozen=True)
class Tiles:
    """Cut of a ragged batch into tiles of rows of one sequence, which the reference takes group by group.

    A tile's window slots are the same positions in the same order however the sequence was cut. Other kernels cut as
    they like and read KeyView alone.
    """

    row_token: Tensor  # int64 [tiles, rows]: token of each row; a row without one repeats some token
    token_row: Tensor  # int64 [T]: tile * rows + row of each token
    in_order: bool  # rows are the tokens in their order
    window_index: Tensor  # int64 [tiles, W]: of [rings of the batch's sequences | new keys | one zero row]
    window_mask: Tensor  # bool [tiles, rows, W]
    groups: list[TileGroup]

    def rows(self, x: Tensor, group: TileGroup) -> Tensor:
        """Rows of x [T, ...] as the group's tiles hold them: [tiles, rows, ...]."""
        tiles = slice(group.first, group.last)
        if self.in_order:
            return x.view(*self.row_token.shape, *x.shape[1:])[tiles]
        return take_rows(x, self.row_token[tiles])

    def tokens(self, x: Tensor) -> Tensor:
        """The reverse, for all tiles: x [tiles, rows, ...] -> [T, ...]."""
        return x.flatten(0, 1) if self.in_order else take_rows(x.flatten(0, 1), self.token_row)


def pick(pool: Tensor, rows: slice | Tensor | None) -> Tensor:
    """Rows of the pool that a group reads: shared [E, D] for a slice, [tiles, E, D] for an index."""
    assert rows is not None
    return pool[rows] if isinstance(rows, slice) else take_rows(pool, rows)
