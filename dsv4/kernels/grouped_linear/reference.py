"""Plain torch definition of the grouped linear map, with its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv4.kernels.stored import matrices_of, widened


def _forward(x: Tensor, sizes: list[int], weights: Tensor) -> Tensor:
    out = x.new_empty(x.shape[0], weights.shape[1])
    for rows, weight, into in zip(x.split(sizes), matrices_of(weights), out.split(sizes), strict=True):
        if len(rows):
            torch.mm(rows, widened(weight).t(), out=into)
    return out


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, weights)
        ctx.sizes = sizes
        return _forward(x, sizes, weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        x, weights = ctx.saved_tensors
        needs_x, _, needs_weights = ctx.needs_input_grad
        d_x = torch.empty_like(x) if needs_x else None
        d_weights = x.new_empty(weights.shape) if needs_weights else None
        spans = list(zip(grad.split(ctx.sizes), x.split(ctx.sizes), strict=True))
        if d_x is not None:
            for (d_rows, _), weight, into in zip(spans, matrices_of(weights), d_x.split(ctx.sizes), strict=True):
                if len(d_rows):
                    torch.mm(d_rows, widened(weight), out=into)
        if d_weights is not None:
            for (d_rows, rows), into in zip(spans, d_weights, strict=True):
                torch.mm(d_rows.mT, rows, out=into)  # zero where there are no rows
        return d_x, None, d_weights


def grouped_linear(x: Tensor, sizes: list[int], weights: Tensor) -> Tensor:
    """Rows of group g of x [n, in] times weights[g] [out, in], transposed -> [n, out]."""
    return _GroupedLinear.apply(x, sizes, weights) if torch.is_grad_enabled() else _forward(x, sizes, weights)
