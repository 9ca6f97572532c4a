"""Rows sorted by group, each group times its own weight: the routed experts' matrix products.

Contract: x [n, in], sizes (rows of each of E groups, in order, adding up to n), weights [E, out, in] of x's dtype, or
stored (kernels/stored.py) -> [n, out]. The weight of a group without rows is not read, and its gradient is zero.
Row i, and row i of x's gradient, depend on row i alone.
Native: sums follow docs/kernels.md, to the bit; no second derivative. (The native forward of inference does not call
this.) It multiplies the numbers that kernels/precision.py says, in forward and backward.
"""

from torch import Tensor

from dsv4.kernels import backends, precision
from dsv4.kernels.grouped_linear import native, reference


def grouped_linear(x: Tensor, sizes: list[int], weights: Tensor) -> Tensor:
    """Rows of group g of x [n, in] times weights[g] [out, in], transposed -> [n, out]."""
    op = native if backends.uses_native("grouped_linear", x, weights) else reference
    return op.grouped_linear(x, sizes, weights, precision.current())


__all__ = ["grouped_linear"]
