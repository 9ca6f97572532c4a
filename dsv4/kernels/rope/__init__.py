"""Rotation of neighboring channels by angles that grow with the position.

Contract:
- rotation(inv_freq fp32 [pairs], positions int64 [...]) -> (cos, signed sin), each fp32 [..., 2 * pairs]: a pair's two
  channels share the cosine; the sine is negative for the even one. Angles are fp32;
- rotate(x [..., D], cos, sin) -> like x: the last 2 * pairs channels rotated, in fp32, the others unchanged. cos and
  sin broadcast against x. With -sin the rotation is inverted; the inverse is also the gradient.
"""

from torch import Tensor

from dsv4.kernels import backends
from dsv4.kernels.rope import native, reference


def rotation(inv_freq: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Factors (cos, signed sin), each fp32 [..., 2 * pairs], of the rotation at int64 positions [...]."""
    op = native if backends.uses_native("rope", inv_freq) else reference
    return op.rotation(inv_freq, positions)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the last channels of x [..., D], pairs (2i, 2i + 1), by factors of `rotation` (broadcast) -> like x."""
    op = native if backends.uses_native("rope", x, cos, sin) else reference
    return op.rotate(x, cos, sin)


__all__ = ["rotate", "rotation"]
