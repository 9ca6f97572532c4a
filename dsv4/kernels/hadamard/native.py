"""The Hadamard rotation on the native kernels, with its gradient; fp32 on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv4.kernels import backends, cpu
from dsv4.kernels.rows import copied_rows


def _hadamard(x: Tensor) -> Tensor:
    rows = copied_rows(x)
    cpu.kernels().hadamard(rows)
    return rows.view(x.shape)


class _Hadamard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _hadamard(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _hadamard(grad)


def hadamard(x: Tensor) -> Tensor:
    """Rotate the last dimension of x [..., n] by H_n / sqrt(n)."""
    return _Hadamard.apply(x) if backends.records(x) else _hadamard(x)
