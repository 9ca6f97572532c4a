"""Tensors as contiguous rows, the arguments of native kernels."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def contiguous_rows(x: Tensor) -> Tensor:
    """x [..., n] as contiguous rows [rows, n], copied only if necessary, without its gradient."""
    return x.detach().reshape(-1, x.shape[-1]).contiguous()


def copied_rows(x: Tensor) -> Tensor:
    """A contiguous copy [rows, n] of x [..., n], for a kernel that works in place."""
    return x.detach().clone(memory_format=torch.contiguous_format).view(-1, x.shape[-1])


def total(values: Tensor) -> Tensor:
    """Sum of fp32 values [n] as a scalar, in float64 on one thread: the same bits whatever the number of threads."""
    return values.new_tensor(float(values.numpy().sum(dtype=np.float64)))
