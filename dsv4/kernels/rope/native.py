"""The rotation on the native kernels; fp32 on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.kernels import cpu
from dsv4.kernels.rows import copied_rows


def rotation(inv_freq: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Factors (cos, signed sin), each fp32 [..., 2 * pairs], of the rotation at int64 positions [...]."""
    cos = torch.empty(positions.numel(), len(inv_freq))
    sin = torch.empty_like(cos)
    cpu.kernels().rotation(inv_freq.tolist(), positions.reshape(-1).contiguous(), cos, sin)
    cos, sin = cos.repeat_interleave(2, dim=-1), torch.stack((-sin, sin), dim=-1).flatten(-2)
    return cos.view(*positions.shape, -1), sin.view(*positions.shape, -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the last channels of x [..., D], pairs (2i, 2i + 1), by factors of `rotation` (broadcast) -> like x."""
    rows = copied_rows(x)
    cpu.kernels().rotate(rows, _per_row(x, cos, 0), _per_row(x, sin, 1))
    return rows.view(x.shape)


def _per_row(x: Tensor, factor: Tensor, channel: int) -> Tensor:
    """Factors [rows of x, pairs] of each pair's even (0) or odd (1) channel."""
    wide = factor.expand(*x.shape[:-1], factor.shape[-1])
    return wide[..., channel::2].reshape(x.numel() // x.shape[-1], factor.shape[-1] // 2)
