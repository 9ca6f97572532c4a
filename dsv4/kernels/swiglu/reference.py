"""Plain torch definition of the clamped SwiGLU, with its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _sigmoid(x: Tensor) -> Tensor:
    # torch.sigmoid rounds differently in the vector body and the scalar tail of an array, which would make a row depend
    # on the rows beside it; exp does not.
    return x.neg().exp_().add_(1.0).reciprocal_()


def _forward(gate: Tensor, up: Tensor, weight: Tensor | None, limit: float) -> Tensor:
    g = gate.float().clamp(max=limit)
    out = _sigmoid(g).mul_(g).mul_(up.float().clamp(-limit, limit))
    if weight is not None:
        out.mul_(weight)
    return out.to(gate.dtype)


class _ClampedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor | None, limit: float) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        ctx.limit = limit
        return _forward(gate, up, weight, limit)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        gate, up, weight = ctx.saved_tensors
        limit = ctx.limit
        g, u, grad = gate.float().clamp(max=limit), up.float().clamp(-limit, limit), grad.float()
        sig = _sigmoid(g)
        silu = g * sig
        d_weight = (grad * silu * u).sum(-1, keepdim=True) if weight is not None else None
        if weight is not None:
            grad = grad * weight
        d_up = (grad * silu).masked_fill_(up.float().abs() > limit, 0.0)
        d_gate = (grad * u * (sig + silu * (1.0 - sig))).masked_fill_(gate > limit, 0.0)
        return d_gate.to(gate.dtype), d_up.to(up.dtype), d_weight, None


def clamped_swiglu(gate: Tensor, up: Tensor, limit: float, weight: Tensor | None = None) -> Tensor:
    """silu(min(gate, limit)) * clamp(up, +-limit) * weight: [n, width], [n, width], [n, 1] -> [n, width]."""
    if not torch.is_grad_enabled():
        return _forward(gate, up, weight, limit)
    return _ClampedSwiGLU.apply(gate, up, weight, limit)
