"""The grouped linear map on the native kernels, with its gradient; fp32 on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv4.kernels import cpu
from dsv4.kernels.gradients import rounds_to_bf16
from dsv4.kernels.stored import matrices_of, rows_argument, weight_argument


def _arguments(weights: Tensor) -> list[Any]:
    return [weight_argument(matrix) for matrix in matrices_of(weights)]


def _forward(x: Tensor, sizes: list[int], weights: Tensor) -> Tensor:
    out = x.new_empty(x.shape[0], weights.shape[1])
    cpu.kernels().grouped_linear(rows_argument(x), sizes, _arguments(weights), out)
    return out


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], weights: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, weights)
        ctx.sizes, ctx.bf16 = sizes, rounds_to_bf16()
        return _forward(x, sizes, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        x, weights = ctx.saved_tensors
        kernels, rows = cpu.kernels(), rows_argument(grad)
        d_x = d_weights = None
        if ctx.needs_input_grad[0]:
            d_x = rows.new_empty(rows.shape[0], weights.shape[2])
            kernels.input_gradients(rows, ctx.sizes, _arguments(weights), d_x, ctx.bf16)
        if x is not None:
            d_weights = rows.new_empty(weights.shape)
            kernels.weight_gradients(rows, rows_argument(x), ctx.sizes, list(d_weights.unbind()), ctx.bf16)
        return d_x, None, d_weights


def grouped_linear(x: Tensor, sizes: list[int], weights: Tensor) -> Tensor:
    """Rows of group g of x [n, in] times weights[g] [out, in], transposed -> [n, out]."""
    trained = torch.is_grad_enabled() and (x.requires_grad or weights.requires_grad)
    return _GroupedLinear.apply(x, sizes, weights) if trained else _forward(x, sizes, weights)
