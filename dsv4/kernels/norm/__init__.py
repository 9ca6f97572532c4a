"""RMS normalization of the last dimension.

Contract: x [..., n], weight [n] or None, in any float dtypes -> x * rsqrt(mean(x^2) + eps) * weight, like x. Computed
in fp32 with one cast at the end. A row's bits depend on that row alone.
"""

from torch import Tensor

from dsv4.kernels import backends
from dsv4.kernels.norm import native, reference


def rms_norm(x: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    """x [..., n] divided by the root of its mean square, times weight [n] -> like x."""
    op = native if backends.uses_native("norm", x, weight) else reference
    return op.rms_norm(x, eps, weight)


__all__ = ["rms_norm"]
