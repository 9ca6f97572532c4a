"""RMS normalization in torch."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) * weight over the last dimension."""
    if x.dtype == torch.float32 and (weight is None or weight.dtype == torch.float32):
        return torch.rms_norm(x, x.shape[-1:], weight, eps)
    weight = weight.float() if weight is not None else None
    return torch.rms_norm(x.float(), x.shape[-1:], weight, eps).to(x.dtype)
