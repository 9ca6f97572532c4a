"""Compression on the native kernels, sequence by sequence; fp32 on the CPU."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dsv4.kernels import cpu
from dsv4.kernels.compressor.views import Windows


def compress(kv: Tensor, score: Tensor, ape: Tensor, windows: Windows) -> Tensor | None:
    """Entries [windows, width] from the projections kv, score [T, total]; writes the state."""
    kernels, batch, ratio, slots = cpu.kernels(), windows.batch, windows.ratio, windows.slots
    total = kv.shape[1]
    kv, score, ape = kv.detach().contiguous(), score.detach().clone(), ape.detach().contiguous()
    made: list[Tensor] = []
    ends = np.cumsum(batch.lengths)
    for i, (end, length, start) in enumerate(zip(ends, batch.lengths, batch.starts, strict=True)):
        rows = slice(end - length, end)
        if windows.state_kv is not None and windows.state_score is not None:
            state = windows.state_kv[batch.slots[i]], windows.state_score[batch.slots[i]]
        else:
            state = kv.new_zeros(slots, total), kv.new_zeros(slots, total)
        # The state is a ring: `start` less whole turns addresses the same rows and needs room for fewer entries.
        first = int(start - max(start // slots - 1, 0) * slots)
        entries = kv.new_empty((first + int(length)) // ratio, total // 2 if windows.overlap else total)
        kernels.compress(ratio, kv[rows], score[rows], ape, first, *state, entries)
        made.append(entries[first // ratio :])
    entries = torch.cat(made)
    return entries if len(entries) else None
