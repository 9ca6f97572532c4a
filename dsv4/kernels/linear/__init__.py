"""Linear map without bias; each output row depends on its input row alone.

Contract: x [..., in], weight [out, in] of the same dtype, or stored (kernels/stored.py) -> [..., out].
Native: sums follow docs/kernels.md, so that rows are independent to the
bit, in the output and in x's gradient; no second derivative. Reference: on x86 row independence rests on MKL's strict
mode, which `dsv4` requests before torch starts where MKL has it (see dsv4/__init__.py).
"""

from torch import Tensor

from dsv4.kernels import backends
from dsv4.kernels.linear import native, reference


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in] @ weight [out, in]^T -> [..., out]."""
    op = native if backends.uses_native("linear", x, weight) else reference
    return op.linear(x, weight)


__all__ = ["linear"]
