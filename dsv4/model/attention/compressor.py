"""Compression of each closed window of tokens to one entry. Source: official inference model.py, Compressor."""

from __future__ import annotations

from dataclasses import replace

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

        In a part of a batch, none are a tensor of no rows: it takes part in the exchange. cos_sin: rotations of entry
        positions by ratio, filled on first use.
        """
        kv, score = linear_fp32(x, self.wkv.matrix), linear_fp32(x, self.wgate.matrix)
        windows = self._windows(layout, state)
        if layout.batch.part is not None:
            state_kv, state_score = layout.batch.part.earlier(windows.slots, kv, score)
            state_score = state_score + self.ape.repeat(windows.slots // self.ratio, 1)
            windows = replace(windows, state_kv=state_kv, state_score=state_score, writes_state=False)
        made = compress(kv, score, self.ape, windows)
        if made is None:
            if windows.writes_state:
                return None
            assert windows.state_kv is not None
            return torch.cat((kv, windows.state_kv[0]))[:0, : self.norm.weight.shape[0]].to(x.dtype)
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
    """View of all entries of the batch's sequences: the cache, after writing the new ones, or else a fresh tensor.

    In a part of a batch, the entries that other processes made for the first sequence come first.
    """
    if state is not None:
        assert layout.cache is not None
        if entries is not None:
            state.write(layout.compression(ratio).entry_row, entries.detach())
        return EntryView(StoredRows(state.entries, state.format), ratio, layout.batch, layout.cache.block_table)
    slack = like.new_zeros(ENTRY_CHUNK, width)
    rows = [slack] if entries is None else [entries, slack]
    if layout.batch.part is not None and entries is not None:
        rows.insert(0, layout.batch.part.earlier_entries(entries, ratio))
    return EntryView(StoredRows(torch.cat(rows)), ratio, layout.batch, None)
