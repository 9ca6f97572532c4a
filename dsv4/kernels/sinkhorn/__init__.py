"""Sinkhorn normalisation of the mHC combine matrix.

Contract: logits [T, s, s] fp32 (first index: source stream, second: target) -> [T, s, s] fp32. Softmax over the second
index, + eps; one column normalisation (over the first index); then iters - 1 times row, column. Every denominator has
+ eps, so sums come out as 1 - eps. The last step is a column normalisation. Sums run left to right, so a matrix's bits
do not depend on T.
"""

from dsv4.kernels.sinkhorn.reference import sinkhorn

__all__ = ["sinkhorn"]
