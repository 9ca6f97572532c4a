"""Matrix product with a weight, each row of the result a function of that row of the input alone.

Contract: x [..., in], weight [out, in] of the same dtype, or as stored (kernels/stored.py) -> [..., out].
Native: fp32 on the CPU, outside autocast; with gradient where `backends.trains`. The sums are those of docs/kernels.md,
so the row independence is to the bit, of the result and of x's gradient; no gradient of a gradient. Reference: on x86
it rests on MKL's strict mode, which `dsv4` asks for before torch starts where MKL has it (see dsv4/__init__.py).
"""

import torch
from torch import Tensor

from dsv4.kernels import backends
from dsv4.kernels.linear import native, reference


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in] @ weight [out, in]^T -> [..., out]."""
    trained = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    op = native if backends.takes(x, weight) and (not trained or backends.trains()) else reference
    return op.linear(x, weight)


__all__ = ["linear"]
