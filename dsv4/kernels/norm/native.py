"""RMS normalization on the native kernels; fp32 on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.kernels import cpu


def rms_norm(x: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) * weight over the last dimension."""
    rows = x.detach().reshape(-1, x.shape[-1]).contiguous()
    out = torch.empty_like(rows)
    cpu.kernels().rms_norm(rows, weight.detach() if weight is not None else None, eps, out)
    return out.view(x.shape)
