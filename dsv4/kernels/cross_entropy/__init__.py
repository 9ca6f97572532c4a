"""Cross-entropy of a linear head.

Contract: x fp32 [n, in], weight [vocab, in], fp32 or stored (kernels/stored.py), targets int64 [n]
-> (loss scalar fp32: the sum over the rows of -log softmax(x weight^T)[target], predicted int64 [n]: the token of the
largest logit, the lower id among equals, or of the first NaN). fp32; a row with a NaN has a loss of NaN. Native: the
logits of 256 rows are in memory at a time, with the bits of kernels/linear, and with them the gradients that are asked
for are computed.
"""

from torch import Tensor

from dsv4.kernels import backends
from dsv4.kernels.cross_entropy import native, reference


def cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(summed loss, predicted tokens [n]) of the rows of x [n, in] with the head's weight [vocab, in]."""
    op = native if backends.uses_native("cross_entropy", x, weight) else reference
    return op.cross_entropy(x, weight, targets)


__all__ = ["cross_entropy"]
