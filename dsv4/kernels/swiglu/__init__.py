"""Clamped SwiGLU of the experts: silu(min(gate, limit)) * clamp(up, -limit, limit), times the routing weight if given.

Contract: gate, up [n, width], weight [n, 1] fp32 or None; computed in fp32, returned in gate's dtype. The gate is
clamped from above only. Clamped elements receive no gradient. NaN is not clamped, and shows in the result and in the
gradients of which it is a factor.
"""

import torch
from torch import Tensor

from dsv4.kernels import backends
from dsv4.kernels.swiglu import native, reference


def clamped_swiglu(gate: Tensor, up: Tensor, limit: float, weight: Tensor | None = None) -> Tensor:
    """silu(min(gate, limit)) * clamp(up, +-limit) * weight: [n, width], [n, width], [n, 1] -> [n, width]."""
    op = native if backends.uses_native("swiglu", gate, up, weight) else reference
    return op.clamped_swiglu(gate, up, limit, weight)


@torch.no_grad()
def count_clamped(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """int64 [3]: gates above the limit, ups beyond it on either side, and the number of values of both."""
    return torch.stack(
        [(gate > limit).sum(), (up.abs() > limit).sum(), torch.tensor(gate.numel() + up.numel(), device=gate.device)]
    )


__all__ = ["clamped_swiglu", "count_clamped"]
