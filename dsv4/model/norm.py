"""RMS normalisation, with and without a weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def rms_norm(x: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) * weight over the last dimension; fp32 inside, one cast to x's dtype at the end."""
    y = x.float()
    y = y * (y.square().mean(-1, keepdim=True) + eps).rsqrt()
    if weight is not None:
        y = y * weight.float()
    return y.to(x.dtype)


class RMSNorm(nn.Module):
    """Weighted RMS norm of the last dimension."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.eps, self.weight)
