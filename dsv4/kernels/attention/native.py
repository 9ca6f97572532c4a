"""Attention on the native kernels, sequence by sequence; fp32 on the CPU."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dsv4.config import WINDOW
from dsv4.kernels import cpu
from dsv4.kernels.attention.views import KeyView


def attend(q: Tensor, keys: KeyView, sink: Tensor, chosen: Tensor | None) -> Tensor:
    """Attention output o [T, H, D] of queries q [T, H, D]."""
    kernels, width = cpu.kernels(), q.shape[2]
    scaled, new = (q.detach() * width**-0.5).contiguous(), keys.new.detach().contiguous()
    out, no_ring, no_entries = torch.empty_like(scaled), new.new_zeros(WINDOW, width), new.new_zeros(0, width)
    ratio = keys.entries.ratio if keys.entries is not None else 0
    if chosen is None:  # k as large as the most entries that a token sees: all read all
        most = int((keys.batch.starts + keys.batch.lengths).max()) // max(ratio, 1)
        chosen = torch.full((1, 1), -1).expand(len(q), max(most, 1))
    ends = np.cumsum(keys.batch.lengths)
    for i, (end, length, start) in enumerate(zip(ends, keys.batch.lengths, keys.batch.starts, strict=True)):
        rows = slice(end - length, end)
        ring = keys.ring.take(keys.slots[i]).float() if keys.ring is not None else no_ring
        entries = keys.entries.of_sequence(i).detach().float() if keys.entries is not None else no_entries
        inputs = (scaled[rows], new[rows], ring, entries, chosen[rows].contiguous(), ratio, int(start), sink.detach())
        kernels.attend(*inputs, out[rows])
    return out
