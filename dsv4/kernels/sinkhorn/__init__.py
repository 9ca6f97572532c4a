"""Sinkhorn normalization of the mHC combine matrix.

Contract: logits [T, s, s] fp32 (first index: source stream, second: target) -> [T, s, s] fp32. Softmax over the second
index, + eps; one column normalization (over the first index); then iters - 1 times row, column. Every denominator has
+ eps, so sums come out as 1 - eps. The last step is a column normalization. Sums run left to right, so a matrix's bits
do not depend on T. Native: at most 64 streams.
"""

from torch import Tensor

from dsv4.kernels import backends
from dsv4.kernels.sinkhorn import native, reference

MOST_ROWS = 64  # of a matrix in the native kernel


def sinkhorn(logits: Tensor, iters: int, eps: float) -> Tensor:
    """Nearly doubly stochastic matrices from logits [T, s, s] fp32 -> [T, s, s]."""
    op = reference
    if backends.uses_native("sinkhorn", logits):
        if logits.shape[-1] <= MOST_ROWS:
            op = native
        else:
            backends.decline(f"sinkhorn has {logits.shape[-1]} streams, its native kernel takes {MOST_ROWS}")
    return op.sinkhorn(logits, iters, eps)


__all__ = ["sinkhorn"]
