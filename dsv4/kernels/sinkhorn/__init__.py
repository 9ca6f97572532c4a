"""Sinkhorn normalisation of the mHC combine matrix.

Contract: logits [T, s, s] fp32 (first index: source stream, second: target) -> [T, s, s] fp32. Softmax over the second
index, + eps; one column normalisation (over the first index); then iters - 1 times row, column. Every denominator has
+ eps, so sums come out as 1 - eps. The last step is a column normalisation. Sums run left to right, so a matrix's bits
do not depend on T.
"""

import torch
from torch import Tensor

from dsv4.kernels.sinkhorn import cpu, reference


def sinkhorn(logits: Tensor, iters: int, eps: float) -> Tensor:
    """Near doubly stochastic matrices from logits [T, s, s] fp32 -> [T, s, s]; see the module for the steps."""
    if not torch.is_grad_enabled() and logits.device.type == "cpu" and logits.shape[0] <= cpu.MAX_TOKENS:
        return cpu.sinkhorn(logits, iters, eps)
    return reference.sinkhorn(logits, iters, eps)


__all__ = ["sinkhorn"]
