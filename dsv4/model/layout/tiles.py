"""Tiles: blocks of TILE positions of one sequence, aligned to multiples of TILE, with their rows in a batch.

A tile's keys are always the same TILE + WINDOW positions in the same order, however the sequence is cut: a query's sums
then run in the same order in a whole prefill, in chunks, in a decode step and in a packed training row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dsv4.config import WINDOW
from dsv4.model.layout.tokens import Tokens

TILE = 64


@dataclass(frozen=True)
class TileCut:
    """G tiles of up to R rows, int64. Tiles at the start of a sequence come first: their windows are shorter."""

    sequence: np.ndarray  # [G]
    block: np.ndarray  # [G]: positions block * TILE to block * TILE + TILE - 1
    end: np.ndarray  # [G]: position behind the last row
    row_position: np.ndarray  # [G, R]; -1 for a row without a token, which sees nothing and gives zeros
    row_token: np.ndarray  # [G, R]: index in the batch; 0 for a row without a token, whose output is not read
    token_row: np.ndarray  # [T]: tile * R + row of each token

    @property
    def count(self) -> int:
        return self.row_position.shape[0]

    @property
    def rows(self) -> int:
        return self.row_position.shape[1]

    def in_order(self) -> bool:
        """True if the rows are the tokens in order, as in a decode step or a chunk of whole tiles."""
        return self.row_position.size == len(self.token_row) and bool((np.diff(self.token_row) == 1).all())


def cut_tiles(tokens: Tokens) -> TileCut:
    """The tiles of a batch."""
    first_block = tokens.starts // TILE
    per_sequence = (tokens.ends - 1) // TILE + 1 - first_block
    first_tile = np.cumsum(per_sequence) - per_sequence
    sequence = np.repeat(np.arange(tokens.num_sequences), per_sequence)
    block = np.arange(len(sequence)) - first_tile[sequence] + first_block[sequence]
    order = np.argsort(np.minimum(block, WINDOW // TILE), kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    sequence, block = sequence[order], block[order]
    start = np.maximum(tokens.starts[sequence], block * TILE)
    end = np.minimum(tokens.ends[sequence], (block + 1) * TILE)
    row = np.arange(int((end - start).max()))
    held = row < (end - start)[:, None]
    first_token = tokens.first[sequence] + start - tokens.starts[sequence]
    tile = rank[first_tile[tokens.sequence] + tokens.position // TILE - first_block[tokens.sequence]]
    return TileCut(
        sequence=sequence,
        block=block,
        end=end,
        row_position=np.where(held, start[:, None] + row, -1),
        row_token=np.where(held, first_token[:, None] + row, 0),
        token_row=tile * len(row) + tokens.position - start[tile],
    )
