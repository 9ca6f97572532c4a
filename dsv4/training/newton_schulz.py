"""HybridNS: ten-step Newton-Schulz orthogonalization (DeepSeek-V4 report, Muon)."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.kernels.newton_schulz import Steps, iterate

# (a, b, c) of X <- aX + b(XX^T)X + c(XX^T)^2 X. The first eight steps move every singular value to about 1 quickly; the
# last two have f(1) = 1 and f'(1) = 0, so they converge quadratically.
FAST = (3.4445, -4.7750, 2.0315)
POLISH = (2.0, -1.5, 0.5)
HYBRID_STEPS: Steps = (FAST,) * 8 + (POLISH,) * 2

# Lower bound of the Frobenius norm that a matrix is divided by: the zero momentum of an expert that never saw a token
# stays exactly zero, and a vanishing momentum is not scaled up to full size.
NORM_FLOOR = 1e-9

# Elements per batched product: enough matrices to fill the cores, few enough to stay in cache (measured: 32 to 96
# matrices of 128 x 256 in bf16 take half the time per matrix of all 672 at once).
CHUNK_ELEMENTS = 48 * 128 * 256


def product_dtype(device: torch.device) -> torch.dtype:
    """Dtype of the products that is fast on a device: BF16, fp32 on processors that would emulate it."""
    fast = device.type != "cpu" or torch.cpu.get_capabilities().get("avx512_bf16", False)
    return torch.bfloat16 if fast else torch.float32


def orthogonalize(
    matrices: Tensor,
    compute_dtype: torch.dtype = torch.bfloat16,
    steps: Steps = HYBRID_STEPS,
) -> Tensor:
    """Orthogonalize each of `matrices` [N, n, m]: singular values become about 1. Shape and dtype of the input.

    Products run in `compute_dtype`; bf16 suffices according to the report. In fp32, singular values within [1e-3, 1] of
    the Frobenius norm end in [1.0000, 1.0005].
    """
    n, m = matrices.shape[-2:]
    per_chunk = max(1, CHUNK_ELEMENTS // (n * m))
    return torch.cat([_orthogonalize(chunk, compute_dtype, steps) for chunk in matrices.split(per_chunk)])


def _orthogonalize(matrices: Tensor, compute_dtype: torch.dtype, steps: Steps) -> Tensor:
    norm = torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True).clamp_min(NORM_FLOOR)
    x = (matrices / norm).to(compute_dtype)
    tall = x.shape[1] > x.shape[2]
    if tall:  # so that the Gram matrix has the size of the short side
        x = x.transpose(1, 2).contiguous()
    x = iterate(x, steps)
    return (x.transpose(1, 2) if tall else x).to(matrices.dtype)
