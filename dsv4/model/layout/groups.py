"""Groups of tiles for one attention call each, with the entries that they may see."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from dsv4.cache import Cache
from dsv4.config import WINDOW
from dsv4.kernels.attention import ENTRY_CHUNK, TileGroup
from dsv4.model.layout.tiles import TILE, TileCut
from dsv4.model.layout.tokens import Tokens

MANY_TILES = 4  # a sequence with this many tiles gets groups of its own, which share its entries


class Grouping:
    """Groups of a batch's tiles, for layers of one ratio; `top_k`: entries kept per row, 0: no indexer."""

    def __init__(
        self, tokens: Tokens, tiles: TileCut, cache: Cache | None, ratio: int, top_k: int, device: torch.device
    ) -> None:
        self.tokens, self.tiles, self.cache, self.ratio, self.device = tokens, tiles, cache, ratio, device
        self.seen = tiles.end // ratio if ratio else np.zeros_like(tiles.end)
        # Depends on the tile's place only, not on the rows that this batch holds: any cut of the sequence agrees.
        most = (tiles.block + 1) * TILE // ratio if ratio else self.seen
        self.sparse = (most > top_k) if top_k else np.zeros(tiles.count, bool)
        self.width = -(-self.seen // ENTRY_CHUNK) * ENTRY_CHUNK
        self.window_skip = np.maximum(0, WINDOW - tiles.block * TILE)

    def cut(self, budget: int) -> list[TileGroup]:
        """All tiles, in groups of at most `budget` (row, key) pairs, or of one tile."""
        return [self._group(first, last) for first, last in self._ranges(budget)]

    def _ranges(self, budget: int) -> Iterator[tuple[int, int]]:
        sequence, skip = self.tiles.sequence, self.window_skip
        many = np.bincount(sequence)[sequence] >= MANY_TILES
        first = 0
        while first < self.tiles.count:
            last, widest = first + 1, int(self.width[first])
            while last < self.tiles.count and self.sparse[last] == self.sparse[first] and skip[last] == skip[first]:
                if sequence[last] != sequence[first] and (many[first] or many[last]):
                    break
                wider = max(widest, int(self.width[last]))
                if (last + 1 - first) * self.tiles.rows * (TILE + WINDOW + wider) > budget:
                    break
                last, widest = last + 1, wider
            yield first, last
            first = last

    def _group(self, first: int, last: int) -> TileGroup:
        position = self.tiles.row_position[first:last]
        width = int(self.width[first:last].max())
        return TileGroup(
            first=first,
            last=last,
            window_skip=int(self.window_skip[first]),
            num_entries=width,
            entries=self._entries(first, last, width) if width else None,
            num_visible=self._tensor((position + 1) // self.ratio if self.ratio else position * 0),
            sparse=bool(self.sparse[first]),
        )

    def _entries(self, first: int, last: int, width: int) -> slice | Tensor:
        """Rows of the entry tensor that tiles first to last - 1 read, `width` per sequence."""
        group = self.tiles.sequence[first:last]
        sequences, which = np.unique(group, return_inverse=True)
        seen = [int(self.seen[first:last][group == s].max()) for s in sequences]
        # Past its end a slice holds other entries of this forward, where a non-finite value shows anyway.
        if self.cache is None and len(sequences) == 1:
            start = self._first_row(int(sequences[0]))
            return slice(start, start + width)
        rows = np.full((len(sequences), width), self._blank_row())
        for i, (sequence, count) in enumerate(zip(sequences, seen, strict=True)):
            rows[i, :count] = self._rows(int(sequence), count)
        return self._tensor(rows[0] if len(sequences) == 1 else rows[which])

    def _rows(self, sequence: int, count: int) -> np.ndarray:
        """Rows of a sequence's first `count` entries."""
        if self.cache is not None:
            return self.cache.entry_rows(int(self.tokens.slots[sequence]), self.ratio, 0, count)
        return self._first_row(sequence) + np.arange(count)

    def _first_row(self, sequence: int) -> int:
        """Without a cache: row of a sequence's first entry in the tensor of this forward's entries."""
        return int((self.tokens.ends[:sequence] // self.ratio).sum())

    def _blank_row(self) -> int:
        if self.cache is not None:
            return self.cache.blank_row(self.ratio)
        return self._first_row(self.tokens.num_sequences)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)
