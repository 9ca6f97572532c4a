"""Rows sorted by group, each group times its own weight: the routed experts' matrix products.

Contract: x [n, in], sizes (rows of each of E groups, in order, adding up to n), weights [E, out, in], of x's dtype or
as stored (kernels/stored.py) -> [n, out]. The weight of a group without rows is not read, and its gradient is zero.
Row i, and row i of x's gradient, depend on row i alone.
Native: where DSV4_KERNELS=native asks for it; the sums are those of docs/kernels.md, to the bit; no gradient of a
gradient. (The native forward of inference does not come here.) Under autocast x and the weights take
its number format, as those of a linear layer do.
"""

from torch import Tensor

from dsv4.kernels import backends
from dsv4.kernels.autocast import product_dtype
from dsv4.kernels.grouped_linear import native, reference
from dsv4.kernels.stored import widened


def grouped_linear(x: Tensor, sizes: list[int], weights: Tensor) -> Tensor:
    """Group g's rows of x [n, in] times weights[g] of [E, out, in], transposed -> [n, out]."""
    dtype = product_dtype(x)
    if dtype is not None:
        x, weights = x.to(dtype), widened(weights).to(dtype)
    op = native if backends.uses_native("grouped_linear", x, weights) else reference
    return op.grouped_linear(x, sizes, weights)


__all__ = ["grouped_linear"]
