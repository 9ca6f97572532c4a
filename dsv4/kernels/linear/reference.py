"""Plain torch definition of the linear map."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4.kernels.precision import (
    Precision,
    forward_rows,
    forward_weights,
    gradient_rows,
    multiply,
    weight_gradient_factors,
)
from dsv4.kernels.stored import widened


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in] @ weight [out, in]^T -> [..., out]."""
    return F.linear(x, widened(weight))


class _RoundedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, precision: Precision) -> Tensor:
        factors = forward_weights(weight)
        ctx.save_for_backward(x)
        ctx.factors, ctx.precision = factors, precision
        rows = forward_rows(x.reshape(-1, x.shape[-1]), precision)
        return multiply(rows, widened(factors).t()).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (x,) = ctx.saved_tensors
        dy, rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        d_x = d_weight = None
        if ctx.needs_input_grad[0]:
            d_x = multiply(gradient_rows(dy, ctx.precision), widened(ctx.factors)).view(x.shape)
        if ctx.needs_input_grad[1]:
            dy, rows = weight_gradient_factors(dy, rows, [len(rows)], ctx.precision)
            d_weight = multiply(dy.t(), rows)
        return d_x, d_weight, None


def rounded_linear(x: Tensor, weight: Tensor, precision: Precision) -> Tensor:
    """`linear` of rounded factors, in a context of kernels/precision.py."""
    return _RoundedLinear.apply(x, weight, precision)
