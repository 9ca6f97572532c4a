"""The clamped SwiGLU on the native kernels; fp32 on the CPU."""

from __future__ import annotations

from torch import Tensor

from dsv4.kernels import cpu
from dsv4.kernels.rows import copied_rows


def clamped_swiglu(gate: Tensor, up: Tensor, limit: float, weight: Tensor | None = None) -> Tensor:
    """silu(min(gate, limit)) * clamp(up, +-limit) * weight: [n, width], [n, width], [n, 1] -> [n, width]."""
    out = copied_rows(gate)
    factors = weight.detach().flatten() if weight is not None else out.new_ones(len(out))
    cpu.kernels().swiglu(out, up.detach().contiguous(), limit, factors)
    return out
