"""Sinkhorn of a few tokens on the CPU: the reference's arithmetic through NumPy, whose calls cost a fifth of torch's.

A decode step runs 39 normalisations of sixteen numbers at each mHC site; in torch the calls take longer than all matrix
products. Additions and divisions are IEEE in both libraries and run in the same order, so the bits are the reference's.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from dsv4.kernels.sinkhorn.reference import softmax_streams_first

MAX_TOKENS = 64  # beyond this torch's vector loops win


def sinkhorn(logits: Tensor, iters: int, eps: float) -> Tensor:
    """As reference.sinkhorn, without gradient; logits [T, s, s] fp32 on the CPU."""
    soft = softmax_streams_first(logits)
    c = soft.numpy()
    small = np.float32(eps)
    np.add(c, small, out=c)
    columns, rows = np.empty_like(c[:1]), np.empty_like(c[:, :1])
    for step in range(2 * iters - 1):
        axis, total = (0, columns) if step % 2 == 0 else (1, rows)
        np.add.reduce(c, axis=axis, out=total, keepdims=True)
        np.add(total, small, out=total)
        np.divide(c, total, out=c)
    return soft.permute(2, 0, 1).contiguous()
