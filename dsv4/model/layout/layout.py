"""Layout: the index tables of one forward, built on the CPU once and shared by all layers."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from dsv4.cache import Cache
from dsv4.config import WINDOW
from dsv4.kernels.attention import Tiles
from dsv4.model.batch import RaggedBatch
from dsv4.model.layout.compression import CompressionLayout, lay_out_compression
from dsv4.model.layout.groups import Grouping
from dsv4.model.layout.tiles import cut_tiles
from dsv4.model.layout.tokens import Tokens
from dsv4.model.layout.window import lay_out_window


class Layout:
    """Index tables of a batch of N sequences and T tokens.

    Without a cache every sequence starts at position 0, except for the first one of a part of a larger batch.
    """

    def __init__(self, batch: RaggedBatch, cache: Cache | None, device: torch.device) -> None:
        self.batch, self.cache, self.device = batch, cache, device
        self._tokens = Tokens.of(batch)
        self._cut = cut_tiles(self._tokens)
        # Sequences with earlier tokens, which lie in rings.
        self._continued = batch.num_seqs if cache is not None else int(batch.part is not None)
        window = lay_out_window(self._tokens, self._cut, self._continued)
        rows = self._tensor(self._cut.row_token), self._tensor(self._cut.token_row)
        self._tables = (*rows, self._cut.in_order(), self._tensor(window.index), self._tensor(window.mask))
        self._compression: dict[int, CompressionLayout] = {}
        self._tiles: dict[tuple[int, int, int], Tiles] = {}

    @cached_property
    def positions(self) -> Tensor:
        """int64 [T]: position of each token in its sequence."""
        return self._tensor(self._tokens.position)

    @cached_property
    def sequence_ids(self) -> Tensor:
        """int64 [T]: sequence of each token."""
        return self._tensor(self._tokens.sequence)

    @cached_property
    def slots(self) -> Tensor:
        """int64 [n]: ring of each sequence with earlier tokens: its cache row, or 0 for the first one of a part."""
        return self._tensor(np.zeros(1, np.int64) if self.batch.part is not None else self._tokens.slots)

    @cached_property
    def ring_write(self) -> tuple[Tensor, Tensor]:
        """(cache row * WINDOW + ring slot [k], token [k]) of the last tokens of each sequence, for its window ring."""
        rows, tokens = self._tokens.last(WINDOW)
        return self._tensor(rows), self._tensor(tokens)

    def count_from(self, position: int) -> int:
        """Number of tokens at `position` of their sequence or later."""
        return int((self._tokens.position >= position).sum())

    def compression(self, ratio: int) -> CompressionLayout:
        """The windows of `ratio` tokens that close in this batch."""
        if ratio not in self._compression:
            self._compression[ratio] = lay_out_compression(
                self._tokens, self.cache, self._continued, ratio, self.device
            )
        return self._compression[ratio]

    def tiles(self, ratio: int, top_k: int, budget: int) -> Tiles:
        """The tiles, in groups of at most `budget` (row, key) pairs; top_k: entries per row, 0 without an indexer."""
        key = (ratio, top_k, budget)
        if key not in self._tiles:
            groups = Grouping(self._tokens, self._cut, self.cache, ratio, top_k, self.device).cut(budget)
            self._tiles[key] = Tiles(*self._tables, groups)
        return self._tiles[key]

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)
