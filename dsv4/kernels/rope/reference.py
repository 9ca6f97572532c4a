"""The rotation in torch, with its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rotation(inv_freq: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Factors (cos, signed sin), each fp32 [..., 2 * pairs], of the rotation at int64 positions [...]."""
    angle = positions.float().unsqueeze(-1) * inv_freq
    sin = angle.sin()
    return angle.cos().repeat_interleave(2, dim=-1), torch.stack((-sin, sin), dim=-1).flatten(-2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    still, turning = x.split((x.shape[-1] - cos.shape[-1], cos.shape[-1]), dim=-1)
    turning = turning.float()
    swapped = turning.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.cat((still, (turning * cos + swapped * sin).to(x.dtype)), dim=-1)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the last channels of x [..., D], pairs (2i, 2i + 1), by factors of `rotation` (broadcast) -> like x."""
    return _Rotate.apply(x, cos, sin) if torch.is_grad_enabled() else _rotate(x, cos, sin)
