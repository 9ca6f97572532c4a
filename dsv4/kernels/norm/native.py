"""RMS normalization on the native kernels, with its gradient; fp32 on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv4.kernels import backends, cpu
from dsv4.kernels.rows import contiguous_rows


def _forward(x: Tensor, eps: float, weight: Tensor | None) -> Tensor:
    rows = contiguous_rows(x)
    out = torch.empty_like(rows)
    cpu.kernels().rms_norm(rows, weight.detach().contiguous() if weight is not None else None, eps, out)
    return out.view(x.shape)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _forward(x, eps, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = contiguous_rows(x)
        d_x, d_weight = torch.empty_like(rows), torch.empty_like(weight) if weight is not None else None
        cpu.kernels().rms_norm_gradient(rows, weight, ctx.eps, contiguous_rows(grad), d_x, d_weight)
        return d_x.view(x.shape), None, d_weight


def rms_norm(x: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) * weight over the last dimension."""
    return _RMSNorm.apply(x, eps, weight) if backends.records(x, weight) else _forward(x, eps, weight)
