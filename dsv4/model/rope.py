"""RoPE frequencies, for interleaved pairs of the last `qk_rope_head_dim` channels (kernels/rope).

Layers with ratio 0 (and the MTP block) use base rope_theta, unscaled. CSA and HCA layers use compress_rope_theta with
YaRN throughout: queries, window keys, entries, indexer, and the inverse rotation of the output. YaRN never scales
magnitudes. Source: official inference model.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsv4.config import ModelConfig


def inverse_frequencies(config: ModelConfig, compressed: bool) -> Tensor:
    """Inverse frequency of each channel pair, fp32 [qk_rope_head_dim / 2], for compressed or window-only layers."""
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
