"""Normalized Walsh-Hadamard transform of the last dimension, natural (Sylvester) order, no random signs.

Contract: x [..., n], n a power of two, any float dtype; computed in fp32, returned in x's dtype. Orthogonal and
symmetric, so it is its own inverse and its own backward.
"""

from torch import Tensor

from dsv4.kernels import backends
from dsv4.kernels.hadamard import native, reference


def hadamard(x: Tensor) -> Tensor:
    """Rotate the last dimension of x [..., n] by H_n / sqrt(n) -> same shape and dtype."""
    n = x.shape[-1]
    assert n & (n - 1) == 0, f"Hadamard size {n} is not a power of two"
    op = native if backends.uses_native("hadamard", x) else reference
    return op.hadamard(x)


__all__ = ["hadamard"]
