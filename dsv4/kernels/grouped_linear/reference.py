"""Plain torch definition of the grouped linear map, with its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv4.kernels.precision import (
    Precision,
    forward_rows,
    forward_weights,
    gradient_rows,
    multiply,
    weight_gradient_factors,
)
from dsv4.kernels.stored import matrices_of, widened


def _forward(x: Tensor, sizes: list[int], weights: Tensor, rounded: bool) -> Tensor:
    out = x.new_empty(x.shape[0], weights.shape[1])
    for rows, weight, into in zip(x.split(sizes), matrices_of(weights), out.split(sizes), strict=True):
        if len(rows):
            _multiply(rows, widened(weight).t(), into, rounded)
    return out


def _multiply(a: Tensor, b: Tensor, into: Tensor, rounded: bool) -> None:
    if rounded:
        into.copy_(multiply(a, b))
    else:
        torch.mm(a, b, out=into)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], weights: Tensor, precision: Precision) -> Tensor:
        ctx.save_for_backward(x, weights)
        ctx.sizes, ctx.precision, ctx.factors = sizes, precision, None
        if precision == "fp32":
            return _forward(x, sizes, weights, False)
        ctx.factors = forward_weights(weights)
        return _forward(forward_rows(x, precision), sizes, ctx.factors, True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        x, weights = ctx.saved_tensors
        rounded = ctx.precision != "fp32"
        d_x = d_weights = None
        if ctx.needs_input_grad[0]:
            d_x = torch.empty_like(x)
            rows = gradient_rows(grad, ctx.precision) if rounded else grad
            factors = matrices_of(ctx.factors if rounded else weights)
            for d_rows, weight, into in zip(rows.split(ctx.sizes), factors, d_x.split(ctx.sizes), strict=True):
                if len(d_rows):
                    _multiply(d_rows, widened(weight), into, rounded)
        if ctx.needs_input_grad[2]:
            d_weights = x.new_empty(weights.shape)
            dy, x = weight_gradient_factors(grad, x, ctx.sizes, ctx.precision) if rounded else (grad, x)
            for d_rows, rows, into in zip(dy.split(ctx.sizes), x.split(ctx.sizes), d_weights, strict=True):
                _multiply(d_rows.mT, rows, into, rounded)  # zero where there are no rows
        return d_x, None, d_weights, None


def grouped_linear(x: Tensor, sizes: list[int], weights: Tensor, precision: Precision = "fp32") -> Tensor:
    """Rows of group g of x [n, in] times weights[g] [out, in], transposed -> [n, out]."""
    if torch.is_grad_enabled():
        return _GroupedLinear.apply(x, sizes, weights, precision)
    if precision == "fp32":
        return _forward(x, sizes, weights, False)
    return _forward(forward_rows(x, precision), sizes, forward_weights(weights), True)
