"""The linear map on the native kernels, with its gradient; fp32 on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv4.kernels import cpu
from dsv4.kernels.precision import Precision, forward_rows, forward_weights
from dsv4.kernels.products import input_gradient, weight_gradient
from dsv4.kernels.stored import rows_argument, weight_argument


def _forward(x: Tensor, weight: Tensor) -> Tensor:
    rows = rows_argument(x)
    out = rows.new_empty(rows.shape[0], weight.shape[0])
    cpu.kernels().linear(rows, weight_argument(weight), out)
    return out.view(*x.shape[:-1], weight.shape[0])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, precision: Precision) -> Tensor:
        needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        ctx.precision, ctx.factors = precision, None
        if precision == "fp32":
            return _forward(x, weight)
        ctx.factors = forward_weights(weight)
        return _forward(forward_rows(x, precision), ctx.factors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        rows = rows_argument(grad)
        d_x = d_weight = None
        if weight is not None:
            d_x = rows.new_empty(rows.shape[0], weight.shape[1])
            factors = [ctx.factors] if ctx.factors is not None else None
            input_gradient(rows, [len(rows)], [weight], factors, d_x, ctx.precision)
            d_x = d_x.view(*grad.shape[:-1], weight.shape[1])
        if x is not None:
            d_weight = rows.new_empty(rows.shape[1], x.shape[-1])
            weight_gradient(rows, rows_argument(x), [len(rows)], [d_weight], ctx.precision)
        return d_x, d_weight, None


def _run(x: Tensor, weight: Tensor, precision: Precision) -> Tensor:
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _Linear.apply(x, weight, precision)
    if precision == "fp32":
        return _forward(x, weight)
    return _forward(forward_rows(x, precision), forward_weights(weight))


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in] @ weight [out, in]^T -> [..., out]."""
    return _run(x, weight, "fp32")


def rounded_linear(x: Tensor, weight: Tensor, precision: Precision) -> Tensor:
    """`linear` of rounded factors, in a context of kernels/precision.py."""
    return _run(x, weight, precision)
