"""The compression windows of one ratio that close in a batch, and the state that later windows need."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dsv4.cache import Cache
from dsv4.config import COMPRESSION_KINDS
from dsv4.model.layout.tokens import Tokens


@dataclass(frozen=True)
class CompressionLayout:
    """W closing windows of `span` tokens each; all int64. `source` indexes [state rows | new tokens | one pad row]."""

    ratio: int
    source: Tensor  # [W, span]; with overlap the previous window's tokens come first
    entry_position: Tensor  # [W]: rope position, the first token of the entry's own window
    entry_row: Tensor  # [W]: row of the entry in the entry tensor
    state_row: Tensor  # [k]: state rows to write
    state_token: Tensor  # [k]: token written to each of them
    state_slots: Tensor  # [sequences with a state]


def lay_out_compression(
    tokens: Tokens, cache: Cache | None, continued: int, ratio: int, device: torch.device
) -> CompressionLayout:
    """The windows of `ratio` tokens that close in a batch, those apart whose entries the cache has.

    continued: the first so many sequences have a state of earlier tokens.
    """
    span = COMPRESSION_KINDS[ratio].state_tokens
    stored = 0 if cache is None else cache.stored[tokens.slots]
    first = np.maximum(tokens.starts, stored) // ratio
    count = np.maximum(tokens.ends // ratio - first, 0)
    seq = np.repeat(np.arange(tokens.num_sequences), count)
    window = np.arange(len(seq)) - (np.cumsum(count) - count)[seq] + first[seq]
    key = window[:, None] * ratio + np.arange(ratio - span, ratio)
    state_rows = span * continued
    start = tokens.starts[seq][:, None]
    pad = state_rows + tokens.count
    source = np.where(key >= start, state_rows + tokens.first[seq][:, None] + key - start, pad)
    entry_row = np.arange(len(seq))
    if continued:
        source = np.where((key >= 0) & (key < start), seq[:, None] * span + key % span, source)
    if cache is not None:
        entry_row = cache.entry_rows_of(tokens.slots[seq], window, ratio)
    state_row, state_token = tokens.last(span)

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    return CompressionLayout(
        ratio=ratio,
        source=tensor(source),
        entry_position=tensor(window * ratio),
        entry_row=tensor(entry_row),
        state_row=tensor(state_row),
        state_token=tensor(state_token),
        state_slots=tensor(tokens.slots[:continued] if cache is not None else np.arange(continued)),
    )
