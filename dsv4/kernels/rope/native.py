"""The rotation on the native kernels, with its gradient; fp32 on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv4.kernels import backends, cpu
from dsv4.kernels.rows import copied_rows


def rotation(inv_freq: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Factors (cos, signed sin), each fp32 [..., 2 * pairs], of the rotation at int64 positions [...]."""
    cos = torch.empty(positions.numel(), len(inv_freq))
    sin = torch.empty_like(cos)
    cpu.kernels().rotation(inv_freq.tolist(), positions.reshape(-1).contiguous(), cos, sin)
    cos, sin = cos.repeat_interleave(2, dim=-1), torch.stack((-sin, sin), dim=-1).flatten(-2)
    return cos.view(*positions.shape, -1), sin.view(*positions.shape, -1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rows = copied_rows(x)
    cpu.kernels().rotate(rows, _per_row(x, cos, 0), _per_row(x, sin, 1))
    return rows.view(x.shape)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the last channels of x [..., D], pairs (2i, 2i + 1), by factors of `rotation` (broadcast) -> like x."""
    return _Rotate.apply(x, cos, sin) if backends.records(x) else _rotate(x, cos, sin)


def _per_row(x: Tensor, factor: Tensor, channel: int) -> Tensor:
    """Factors [rows of x, pairs] of each pair's even (0) or odd (1) channel."""
    wide = factor.expand(*x.shape[:-1], factor.shape[-1])
    return wide[..., channel::2].reshape(x.numel() // x.shape[-1], factor.shape[-1] // 2)
