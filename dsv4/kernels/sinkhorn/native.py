"""The Sinkhorn normalization on the native kernels; fp32 on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.kernels import cpu


def sinkhorn(logits: Tensor, iters: int, eps: float) -> Tensor:
    """Nearly doubly stochastic matrices from logits [T, s, s] -> [T, s, s]."""
    out = logits.detach().clone(memory_format=torch.contiguous_format)
    cpu.kernels().sinkhorn(out, iters, eps)
    return out
