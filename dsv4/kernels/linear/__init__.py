"""Linear map without bias; each output row depends on its input row alone.

Contract: x [..., in], weight [out, in] of the same dtype, or stored (kernels/stored.py) -> [..., out]. `linear`
multiplies the numbers that kernels/precision.py says, in forward and backward; `linear_fp32` the values themselves.
Native: sums follow docs/kernels.md, so that rows are independent to the
bit, in the output and in x's gradient; no second derivative. Reference: on x86 row independence rests on MKL's strict
mode, which `dsv4` requests before torch starts where MKL has it (see dsv4/__init__.py).
"""

from torch import Tensor

from dsv4.kernels import backends, precision
from dsv4.kernels.linear import native, reference


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in] @ weight [out, in]^T -> [..., out], a product of a layer."""
    name = precision.current()
    if name == "fp32":
        return linear_fp32(x, weight)
    op = native if backends.uses_native("linear", x, weight) else reference
    return op.rounded_linear(x, weight, name)


def linear_fp32(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in] @ weight [out, in]^T -> [..., out], without rounding in any precision."""
    op = native if backends.uses_native("linear", x, weight) else reference
    return op.linear(x, weight)


__all__ = ["linear", "linear_fp32"]
