"""Compression of closed windows of tokens to one entry each. Source: official inference model.py, Compressor."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsv4.cache import CompressorState
from dsv4.config import COMPRESSION_KINDS, ModelConfig
from dsv4.kernels.attention import ENTRY_CHUNK
from dsv4.model.gather import take_rows
from dsv4.model.layout import CompressionLayout, Layout
from dsv4.model.linear import Linear, linear_fp32
from dsv4.model.norm import RMSNorm
from dsv4.model.rope import rotate, rotation


def pool(kv: Tensor, score: Tensor) -> Tensor:
    """Gated sum over the slots of each window: kv, score fp32 [windows, slots, D] -> [windows, D].

    The softmax runs over the slots, channel by channel; a slot with score -inf counts for nothing.
    """
    return (torch.softmax(score, dim=1) * kv).sum(1)


def fold_overlap(rows: Tensor, ratio: int) -> Tensor:
    """[windows, 2 * ratio, 2 * D] -> [windows, 2 * ratio, D]: first half of the channels from the previous window's
    tokens, second half from the window's own."""
    width = rows.shape[-1] // 2
    return torch.cat((rows[:, :ratio, :width], rows[:, ratio:, width:]), dim=1)


class Compressor(nn.Module):
    """One entry of `width` channels per closed window of `ratio` tokens, which may overlap with the one before."""

    def __init__(self, config: ModelConfig, width: int, ratio: int) -> None:
        super().__init__()
        kind = COMPRESSION_KINDS[ratio]
        self.ratio, self.overlap = ratio, kind.overlap
        total = kind.channels(width)
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
        """x [T, d] -> entries [windows closed here, width] in x's dtype, normed and rotated; None when none closes."""
        where = layout.compression(self.ratio)
        kv = linear_fp32(x, self.wkv.weight)
        score = linear_fp32(x, self.wgate.weight) + take_rows(self.ape, layout.positions % self.ratio)
        entries = None
        if where.source.shape[0]:
            kv_rows, score_rows = self._windows(kv, score, where, state)
            if self.overlap:
                kv_rows, score_rows = fold_overlap(kv_rows, self.ratio), fold_overlap(score_rows, self.ratio)
            entries = self.norm(pool(kv_rows, score_rows).to(x.dtype))
            if self.ratio not in cos_sin:
                cos_sin[self.ratio] = rotation(inv_freq, where.entry_position)
            entries = rotate(entries, *cos_sin[self.ratio])
        if state is not None:
            state.kv.view(-1, kv.shape[1])[where.state_row] = kv.detach()[where.state_token]
            state.score.view(-1, kv.shape[1])[where.state_row] = score.detach()[where.state_token]
        return entries

    def _windows(
        self, kv: Tensor, score: Tensor, where: CompressionLayout, state: CompressorState | None
    ) -> tuple[Tensor, Tensor]:
        """The slots of each closing window, from the state, the new tokens and one pad row: [windows, slots, width]."""
        width = kv.shape[1]
        kv_parts, score_parts = [kv, kv.new_zeros(1, width)], [score, score.new_full((1, width), float("-inf"))]
        if state is not None:
            kv_parts.insert(0, state.kv[where.state_slots].view(-1, width))
            score_parts.insert(0, state.score[where.state_slots].view(-1, width))
        return take_rows(torch.cat(kv_parts), where.source), take_rows(torch.cat(score_parts), where.source)


def store_entries(
    entries: Tensor | None, layout: Layout, ratio: int, state: CompressorState | None, like: Tensor, width: int
) -> Tensor:
    """The entry tensor that the layout's groups index: the cache's with the new entries written, or a fresh one."""
    where = layout.compression(ratio)
    if state is not None:
        if entries is not None:
            state.write(where.entry_row, entries.detach())
        return state.entries
    slack = like.new_zeros(ENTRY_CHUNK, width)
    return slack if entries is None else torch.cat((entries, slack))
