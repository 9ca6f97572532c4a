"""The Hadamard rotation on the native kernels; fp32 on the CPU."""

from __future__ import annotations

from torch import Tensor

from dsv4.kernels import cpu
from dsv4.kernels.rows import copied_rows


def hadamard(x: Tensor) -> Tensor:
    """Rotate the last dimension of x [..., n] by H_n / sqrt(n)."""
    rows = copied_rows(x)
    cpu.kernels().hadamard(rows)
    return rows.view(x.shape)
