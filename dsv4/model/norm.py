"""RMS norm with a weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsv4.kernels.norm import rms_norm


class RMSNorm(nn.Module):
    """Weighted RMS norm of the last dimension."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.eps, self.weight)
