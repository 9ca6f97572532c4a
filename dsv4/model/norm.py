"""RMS normalisation, with and without a weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def rms_norm(x: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) * weight over the last dimension; fp32 inside, one cast to x's dtype at the end."""
    if x.dtype == torch.float32 and (weight is None or weight.dtype == torch.float32):
        return torch.rms_norm(x, x.shape[-1:], weight, eps)
    weight = weight.float() if weight is not None else None
    return torch.rms_norm(x.float(), x.shape[-1:], weight, eps).to(x.dtype)


class RMSNorm(nn.Module):
    """Weighted RMS norm of the last dimension."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.eps, self.weight)
