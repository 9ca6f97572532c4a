"""Plain torch definition of the Sinkhorn normalization, with its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _total(c: Tensor, axis: int) -> Tensor:
    parts = list(c.unbind(axis))
    total = parts.pop(0).clone()
    for part in parts:
        total.add_(part)
    return total.unsqueeze(axis)


def softmax_streams_first(logits: Tensor) -> Tensor:
    """Softmax over the second stream index: logits [T, s, s] -> [s, s, T], contiguous."""
    a = logits.permute(1, 2, 0).contiguous()
    soft = (a - a.amax(1, keepdim=True)).exp_()
    return soft.div_(_total(soft, 1))


class _Sinkhorn(torch.autograd.Function):
    """Computed in [s, s, T], tokens last, so that every step is a long vector operation."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, iters: int, eps: float) -> Tensor:
        soft = softmax_streams_first(logits)
        c = soft + eps
        keep = ctx.needs_input_grad[0]
        steps: list[Tensor] = []
        for i in range(2 * iters - 1):
            if keep:
                steps.append(c)
            denominator = _total(c, i % 2).add_(eps)  # even steps: column (sum over the first index)
            c = c / denominator if keep else c.div_(denominator)
        if keep:
            ctx.save_for_backward(soft, *steps)
            ctx.eps = eps
        return c.permute(2, 0, 1).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        soft, *steps = ctx.saved_tensors
        g = grad.permute(1, 2, 0).contiguous()
        for i in reversed(range(len(steps))):
            c, axis = steps[i], i % 2
            denominator = _total(c, axis).add_(ctx.eps)
            # y = c / d(c): dc = (g - sum(g * y)) / d
            g = (g - _total(g * c, axis).div_(denominator)).div_(denominator)
        g = soft * (g - _total(g * soft, 1))
        return g.permute(2, 0, 1).contiguous(), None, None


def sinkhorn(logits: Tensor, iters: int, eps: float) -> Tensor:
    """Nearly doubly stochastic matrices from logits [T, s, s] fp32 -> [T, s, s]."""
    return _Sinkhorn.apply(logits, iters, eps)
