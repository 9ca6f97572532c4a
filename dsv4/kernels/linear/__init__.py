"""Matrix product with a weight, each row of the result a function of that row of the input alone.

Contract: x [..., in], weight [out, in] of the same dtype, or as stored (kernels/stored.py) -> [..., out].
Native: with gradient where DSV4_KERNELS=native asks for it. The sums are those of docs/kernels.md, so the row
independence is to the bit, of the result and of x's gradient; no gradient of a gradient. Reference: on x86 it rests on
MKL's strict mode, which `dsv4` asks for before torch starts where MKL has it (see dsv4/__init__.py).
"""

from torch import Tensor

from dsv4.kernels import backends
from dsv4.kernels.linear import native, reference


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in] @ weight [out, in]^T -> [..., out]."""
    op = native if backends.uses_native("linear", x, weight) else reference
    return op.linear(x, weight)


__all__ = ["linear"]
