"""Compression of each closed window of tokens to one entry. Source: official inference model.py, Compressor."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsv4.cache import CompressorState
from dsv4.config import COMPRESSION_KINDS, ModelConfig
from dsv4.kernels.attention import ENTRY_CHUNK, EntryView, StoredRows
from dsv4.kernels.compressor import Windows, compress
from dsv4.kernels.rope import rotate, rotation
from dsv4.model.layout import Layout
from dsv4.model.linear import Linear, linear_fp32
from dsv4.model.norm import RMSNorm


class Compressor(nn.Module):
    """One entry of `width` channels per closed window of `ratio` tokens, which may overlap with the one before."""

    def __init__(self, config: ModelConfig, width: int, ratio: int) -> None:
        super().__init__()
        self.ratio = ratio
        total = COMPRESSION_KINDS[ratio].channels(width)
        self.ape = nn.Parameter(torch.empty(ratio, total))
        self.wkv = Linear(config.hidden_size, total)
        self.wgate = Linear(config.hidden_size, total)
        self.norm = RMSNorm(width, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        layout: Layout,
        state: CompressorState | None,
        inv_freq: Tensor,
        cos_sin: dict[int, tuple[Tensor, Tensor]],
    ) -> Tensor | None:
        """x [T, d] -> entries [windows closed here, width] in x's dtype, normed and rotated; None if no window closes.

        cos_sin: rotations of entry positions by ratio, filled on first use.
        """
        kv, score = linear_fp32(x, self.wkv.matrix), linear_fp32(x, self.wgate.matrix)
        made = compress(kv, score, self.ape, self._windows(layout, state))
        if made is None:
            return None
        if self.ratio not in cos_sin:
            cos_sin[self.ratio] = rotation(inv_freq, layout.compression(self.ratio).entry_position)
        return rotate(self.norm(made.to(x.dtype)), *cos_sin[self.ratio])

    def _windows(self, layout: Layout, state: CompressorState | None) -> Windows:
        where = layout.compression(self.ratio)
        return Windows(
            ratio=self.ratio,
            batch=layout.batch,
            positions=layout.positions,
            source=where.source,
            state_kv=state.kv if state is not None else None,
            state_score=state.score if state is not None else None,
            state_slots=where.state_slots,
            state_row=where.state_row,
            state_token=where.state_token,
        )


def store_entries(
    entries: Tensor | None, layout: Layout, ratio: int, state: CompressorState | None, like: Tensor, width: int
) -> EntryView:
    """View of all entries of the batch's sequences: the cache, after writing the new ones, or else a fresh tensor."""
    if state is not None:
        assert layout.cache is not None
        if entries is not None:
            state.write(layout.compression(ratio).entry_row, entries.detach())
        return EntryView(StoredRows(state.entries, state.format), ratio, layout.batch, layout.cache.block_table)
    slack = like.new_zeros(ENTRY_CHUNK, width)
    pool = slack if entries is None else torch.cat((entries, slack))
    return EntryView(StoredRows(pool), ratio, layout.batch, None)
