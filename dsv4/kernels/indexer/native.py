"""The indexer's choice on the native kernels, sequence by sequence; fp32 on the CPU."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dsv4.kernels import cpu
from dsv4.kernels.attention.views import EntryView


def select_entries(q: Tensor, weights: Tensor, keys: EntryView, k: int) -> Tensor:
    """Chosen entries [T, k] of the tokens; all -1 for a token that sees k or fewer."""
    kernels, batch = cpu.kernels(), keys.batch
    q, weights = q.detach().contiguous(), weights.detach().contiguous()
    chosen = torch.full((len(q), k), -1)
    ends = np.cumsum(batch.lengths)
    for i, (end, length, start) in enumerate(zip(ends, batch.lengths, batch.starts, strict=True)):
        if (start + length) // keys.ratio > k:
            rows = slice(end - length, end)
            kernels.index_top_k(
                q[rows], weights[rows], keys.of_sequence(i).detach().float(), int(start), k, chosen[rows]
            )
    return chosen
