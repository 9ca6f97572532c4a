"""Rotary positions: interleaved pairs of the last `qk_rope_head_dim` channels, fp32 angles.

Layers with ratio 0 (and the MTP block) use base rope_theta, unscaled. CSA and HCA layers use compress_rope_theta with YaRN
for everything in them: queries, window keys, entries, indexer, and the inverse rotation of the output. YaRN never scales
magnitudes. Source: architecture notes 2.2.
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
            return dim * math.log(yarn.original_max_position_embeddings / (2 * math.pi * rotations)) / (2 * math.log(base))

        low = max(math.floor(corrected(yarn.beta_fast)), 0)
        high = min(math.ceil(corrected(yarn.beta_slow)), dim - 1)
        ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / max(high - low, 1e-3)).clamp(0, 1)
        freq = freq * (1 - ramp) + freq / yarn.factor * ramp
    return freq.float()


def rotation(inv_freq: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, sin) of the angles at int64 positions [...], each fp32 [..., pairs]."""
    angle = positions.float().unsqueeze(-1) * inv_freq
    return angle.cos(), angle.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out = x.clone()
    pairs = x[..., -2 * cos.shape[-1] :].float().unflatten(-1, (-1, 2))
    even, odd = pairs[..., 0], pairs[..., 1]
    rotated = out[..., -2 * cos.shape[-1] :].unflatten(-1, (-1, 2))
    rotated[..., 0] = even * cos - odd * sin
    rotated[..., 1] = even * sin + odd * cos
    return out


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
    """Rotate pairs (2i, 2i+1) of the last channels of x [..., D] by cos, sin [..., pairs] (broadcast) -> like x."""
    return _Rotate.apply(x, cos, sin) if torch.is_grad_enabled() else _rotate(x, cos, sin)
