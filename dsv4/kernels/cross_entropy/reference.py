"""Plain torch definition of the cross-entropy of a linear head."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dsv4.kernels.linear import linear_fp32


def cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(summed loss, predicted tokens [n]) of the rows of x [n, in] with the head's weight [vocab, in]."""
    logits = linear_fp32(x, weight.float())
    return F.cross_entropy(logits, targets, reduction="sum"), logits.detach().argmax(-1)
