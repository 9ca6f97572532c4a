"""The cross-entropy of a linear head on the native kernels, with its gradient; fp32 on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv4.kernels import backends, cpu
from dsv4.kernels.precision import current, multiplies_bf16
from dsv4.kernels.rows import total
from dsv4.kernels.stored import weight_argument


def _run(
    x: Tensor, weight: Tensor, targets: Tensor, needs_x: bool, needs_weight: bool
) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None]]:
    """(summed loss, predicted [n], the loss's gradients with respect to x and weight where needed)."""
    x = x.detach().contiguous()
    losses, predicted = x.new_empty(len(x)), torch.empty(len(x), dtype=torch.int64)
    d_x = torch.empty_like(x) if needs_x else None
    d_weight = x.new_empty(weight.shape) if needs_weight else None
    inputs = (x, weight_argument(weight), targets.contiguous())
    bf16 = current() != "fp32" and multiplies_bf16()
    cpu.kernels().cross_entropy(*inputs, losses, predicted, d_x, d_weight, bf16)
    return total(losses), predicted, (d_x, d_weight)


class _CrossEntropy(torch.autograd.Function):
    """The gradients are computed with the loss, which has the same logits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        loss, predicted, grads = _run(x, weight, targets, *ctx.needs_input_grad[:2])
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(predicted)
        return loss, predicted

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        return *(own * grad if own is not None else None for own in ctx.saved_tensors), None


def cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(summed loss, predicted tokens [n]) of the rows of x [n, in] with the head's weight [vocab, in]."""
    if backends.records(x, weight):
        return _CrossEntropy.apply(x, weight, targets)
    return _run(x, weight, targets, needs_x=False, needs_weight=False)[:2]
