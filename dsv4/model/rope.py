"""Rotary positions: interleaved pairs of the last `qk_rope_head_dim` channels, fp32 angles.

Layers with ratio 0 (and the MTP block) use base rope_theta, unscaled. CSA and HCA layers use compress_rope_theta with
YaRN for everything in them: queries, window keys, entries, indexer, and the inverse rotation of the output. YaRN never
scales magnitudes. Source: official inference model.py.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dsv4.config import ModelConfig


def inverse_frequencies(config: ModelConfig, compressed: bool) -> Tensor:
    """Rotation speed of each channel pair, fp32 [qk_rope_head_dim / 2], for compressed or window-only layers."""
    dim = config.qk_rope_head_dim
    base = config.compress_rope_theta if compressed else config.rope_theta
    freq = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    yarn = config.rope_scaling
    if compressed and yarn is not None:

        def corrected(rotations: float) -> float:
            period = yarn.original_max_position_embeddings / rotations
            return dim * math.log(period / (2 * math.pi)) / (2 * math.log(base))

        low = max(math.floor(corrected(yarn.beta_fast)), 0)
        high = min(math.ceil(corrected(yarn.beta_slow)), dim - 1)
        ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / max(high - low, 1e-3)).clamp(0, 1)
        freq = freq * (1 - ramp) + freq / yarn.factor * ramp
    return freq.float()


def rotation(inv_freq: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the rotation at int64 positions [...]: (cos, signed sin), each fp32 [..., 2 * pairs].

    A pair's two channels share the cosine; the sine is negative for the even one.
    """
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
    """Rotate the last channels of x [..., D], pairs (2i, 2i + 1), by factors of `rotation` (broadcast) -> like x.

    With -sin the rotation is inverted.
    """
    return _Rotate.apply(x, cos, sin) if torch.is_grad_enabled() else _rotate(x, cos, sin)
