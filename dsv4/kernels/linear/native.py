"""The linear map on the native kernels, with its gradient; fp32 on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv4.kernels import cpu
from dsv4.kernels.gradients import rounds_to_bf16
from dsv4.kernels.stored import rows_argument, weight_argument


def _forward(x: Tensor, weight: Tensor) -> Tensor:
    rows = rows_argument(x)
    out = rows.new_empty(rows.shape[0], weight.shape[0])
    cpu.kernels().linear(rows, weight_argument(weight), out)
    return out.view(*x.shape[:-1], weight.shape[0])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        needs_x, needs_weight = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        ctx.bf16 = rounds_to_bf16()
        return _forward(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        kernels, rows = cpu.kernels(), rows_argument(grad)
        d_x = d_weight = None
        if weight is not None:
            d_x = rows.new_empty(rows.shape[0], weight.shape[1])
            kernels.input_gradients(rows, [len(rows)], [weight_argument(weight)], d_x, ctx.bf16)
            d_x = d_x.view(*grad.shape[:-1], weight.shape[1])
        if x is not None:
            d_weight = rows.new_empty(rows.shape[1], x.shape[-1])
            kernels.weight_gradients(rows, rows_argument(x), [len(rows)], [d_weight], ctx.bf16)
        return d_x, d_weight


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in] @ weight [out, in]^T -> [..., out]."""
    trained = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return _Linear.apply(x, weight) if trained else _forward(x, weight)
