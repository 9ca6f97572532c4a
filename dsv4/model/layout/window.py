"""Window keys of each tile: their rows in memory, and the mask of keys that each of the tile's rows sees."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dsv4.config import WINDOW
from dsv4.model.layout.tiles import TILE, TileCut
from dsv4.model.layout.tokens import Tokens


@dataclass(frozen=True)
class WindowTable:
    """Keys of G tiles with R rows, at the TILE + WINDOW positions from WINDOW before a tile to its end."""

    index: np.ndarray  # int64 [G, TILE + WINDOW]: row of [rings of the sequences | new tokens | one row of zeros]
    mask: np.ndarray  # bool [G, R, TILE + WINDOW]


def lay_out_window(tokens: Tokens, tiles: TileCut, rings: int) -> WindowTable:
    """Window keys of a batch; the rings of the first `rings` sequences, of earlier tokens, come before the new ones."""
    key = tiles.block[:, None] * TILE - WINDOW + np.arange(TILE + WINDOW)
    start, end = tokens.starts[tiles.sequence][:, None], tokens.ends[tiles.sequence][:, None]
    ring_rows = WINDOW * rings
    index = np.full(key.shape, ring_rows + tokens.count)
    new = (key >= start) & (key < end)
    index = np.where(new, ring_rows + tokens.first[tiles.sequence][:, None] + key - start, index)
    if rings:
        old = (key >= 0) & (key < start) & (key >= start - WINDOW)
        index = np.where(old, tiles.sequence[:, None] * WINDOW + key % WINDOW, index)
    query = tiles.row_position[..., None]
    seen = (key[:, None] >= 0) & (key[:, None] <= query) & (key[:, None] > query - WINDOW)
    return WindowTable(index, seen)
