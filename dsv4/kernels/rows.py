"""Tensors as contiguous rows, the arguments that native kernels change in place."""

from __future__ import annotations

import torch
from torch import Tensor


def copied_rows(x: Tensor) -> Tensor:
    """A contiguous copy [rows, n] of x [..., n], for a kernel that works in place."""
    return x.detach().clone(memory_format=torch.contiguous_format).view(-1, x.shape[-1])
