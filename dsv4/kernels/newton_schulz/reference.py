"""Newton-Schulz iterations in torch."""

from __future__ import annotations

import torch
from torch import Tensor


def iterate(x: Tensor, steps: tuple[tuple[float, float, float], ...]) -> Tensor:
    """The matrices x [N, n, m], n <= m, after the steps."""
    for a, b, c in steps:
        gram = torch.bmm(x, x.transpose(1, 2))
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, poly, x, beta=a)
    return x
