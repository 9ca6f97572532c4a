"""Compression in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.kernels.compressor.views import Windows
from dsv4.kernels.gather import take_rows


def compress(kv: Tensor, score: Tensor, ape: Tensor, windows: Windows) -> Tensor | None:
    """Entries [windows, width] from the projections kv, score [T, total]; writes the state."""
    score = score + take_rows(ape, windows.positions % windows.ratio)
    entries = None
    if windows.source.shape[0]:
        kv_rows, score_rows = _slots(kv, score, windows)
        if windows.overlap:
            kv_rows, score_rows = fold_overlap(kv_rows, windows.ratio), fold_overlap(score_rows, windows.ratio)
        entries = pool(kv_rows, score_rows)
    if windows.writes_state and windows.state_kv is not None and windows.state_score is not None:
        windows.state_kv.view(-1, kv.shape[1])[windows.state_row] = kv.detach()[windows.state_token]
        windows.state_score.view(-1, kv.shape[1])[windows.state_row] = score.detach()[windows.state_token]
    return entries


def _slots(kv: Tensor, score: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    """kv and score [windows, slots, total] of each closing window, from the state, the new tokens and one pad row."""
    width = kv.shape[1]
    kv_parts, score_parts = [kv, kv.new_zeros(1, width)], [score, score.new_full((1, width), float("-inf"))]
    if windows.state_kv is not None and windows.state_score is not None:
        kv_parts.insert(0, windows.state_kv[windows.state_slots].view(-1, width))
        score_parts.insert(0, windows.state_score[windows.state_slots].view(-1, width))
    return take_rows(torch.cat(kv_parts), windows.source), take_rows(torch.cat(score_parts), windows.source)


def pool(kv: Tensor, score: Tensor) -> Tensor:
    """Gated sum over the slots of each window: kv, score fp32 [windows, slots, D] -> [windows, D].

    The softmax runs over the slots, channel by channel; a slot with score -inf has no weight.
    """
    return (torch.softmax(score, dim=1) * kv).sum(1)


def fold_overlap(rows: Tensor, ratio: int) -> Tensor:
    """[windows, 2 * ratio, 2 * D] -> [windows, 2 * ratio, D]: first half of the channels from the previous window's
    tokens, second half from the window's own."""
    width = rows.shape[-1] // 2
    return torch.cat((rows[:, :ratio, :width], rows[:, ratio:, width:]), dim=1)
