"""The grouped linear map on the native kernels, with its gradient; fp32 on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv4.kernels import cpu
from dsv4.kernels.precision import Precision, forward_rows, forward_weights
from dsv4.kernels.products import input_gradient, weight_gradient
from dsv4.kernels.stored import matrices_of, rows_argument, weight_argument


def _forward(x: Tensor, sizes: list[int], weights: Tensor) -> Tensor:
    out = x.new_empty(x.shape[0], weights.shape[1])
    arguments = [weight_argument(matrix) for matrix in matrices_of(weights)]
    cpu.kernels().grouped_linear(rows_argument(x), sizes, arguments, out)
    return out


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], weights: Tensor, precision: Precision) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, weights)
        ctx.sizes, ctx.precision, ctx.factors = sizes, precision, None
        if precision == "fp32":
            return _forward(x, sizes, weights)
        ctx.factors = forward_weights(weights)
        return _forward(forward_rows(x, precision), sizes, ctx.factors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        x, weights = ctx.saved_tensors
        rows, factors = rows_argument(grad), ctx.factors
        d_x = d_weights = None
        if ctx.needs_input_grad[0]:
            d_x = rows.new_empty(rows.shape[0], weights.shape[2])
            rounded = matrices_of(factors) if factors is not None else None
            input_gradient(rows, ctx.sizes, matrices_of(weights), rounded, d_x, ctx.precision)
        if x is not None:
            d_weights = rows.new_empty(weights.shape)
            weight_gradient(rows, rows_argument(x), ctx.sizes, d_weights.unbind(), ctx.precision)
        return d_x, None, d_weights, None


def grouped_linear(x: Tensor, sizes: list[int], weights: Tensor, precision: Precision = "fp32") -> Tensor:
    """Rows of group g of x [n, in] times weights[g] [out, in], transposed -> [n, out]."""
    if torch.is_grad_enabled() and (x.requires_grad or weights.requires_grad):
        return _GroupedLinear.apply(x, sizes, weights, precision)
    if precision == "fp32":
        return _forward(x, sizes, weights)
    return _forward(forward_rows(x, precision), sizes, forward_weights(weights))
