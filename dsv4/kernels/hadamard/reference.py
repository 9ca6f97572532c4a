"""Plain torch definition of the Hadamard rotation."""

from __future__ import annotations

import torch
from torch import Tensor


def hadamard(x: Tensor) -> Tensor:
    """Rotate the last dimension of x [..., n] by H_n / sqrt(n) -> same shape and dtype. n must be a power of two."""
    n = x.shape[-1]
    y, half = x.float(), 1
    while half < n:
        pairs = y.unflatten(-1, (n // (2 * half), 2, half))
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        y = torch.stack((a + b, a - b), dim=-2).flatten(-3)
        half *= 2
    return (y * n**-0.5).to(x.dtype)
