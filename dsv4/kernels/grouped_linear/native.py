"""The grouped linear map on the native kernels, with its derivative; fp32 on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv4.kernels import cpu
from dsv4.kernels.stored import rows_argument, weight_argument


def _forward(x: Tensor, sizes: list[int], weights: Sequence[Tensor]) -> Tensor:
    out = x.new_empty(x.shape[0], weights[0].shape[0])
    cpu.kernels().grouped_linear(rows_argument(x), sizes, [weight_argument(w) for w in weights], out)
    return out


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x if any(ctx.needs_input_grad[2:]) else None, *weights)
        ctx.sizes = sizes
        return _forward(x, sizes, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        needs_x, _, *needs_weight = ctx.needs_input_grad
        kernels, rows = cpu.kernels(), rows_argument(grad)
        d_x = None
        d_weights: list[Tensor | None] = [None] * len(weights)
        if needs_x:
            d_x = rows.new_empty(rows.shape[0], weights[0].shape[1])
            kernels.input_gradients(rows, ctx.sizes, [weight_argument(w) for w in weights], d_x)
        if x is not None:
            for group, size in enumerate(ctx.sizes):
                if size and needs_weight[group]:
                    d_weights[group] = rows.new_empty(rows.shape[1], x.shape[1])
            kernels.weight_gradients(rows, rows_argument(x), ctx.sizes, d_weights)
        return d_x, None, *d_weights


def grouped_linear(x: Tensor, sizes: list[int], weights: Sequence[Tensor]) -> Tensor:
    """Group g's rows of x [n, in] times weights[g] [out, in] transposed -> [n, out]."""
    trained = torch.is_grad_enabled() and (x.requires_grad or any(w.requires_grad for w in weights))
    return _GroupedLinear.apply(x, sizes, *weights) if trained else _forward(x, sizes, weights)
