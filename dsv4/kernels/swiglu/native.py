"""The clamped SwiGLU on the native kernels, with its gradient; fp32 on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv4.kernels import backends, cpu
from dsv4.kernels.rows import copied_rows


def _factors(gate: Tensor, weight: Tensor | None) -> Tensor:
    """The rows' weights [n], 1 without any."""
    return weight.detach().flatten().contiguous() if weight is not None else gate.new_ones(len(gate))


def _forward(gate: Tensor, up: Tensor, limit: float, weight: Tensor | None) -> Tensor:
    out = copied_rows(gate)
    cpu.kernels().swiglu(out, up.detach().contiguous(), limit, _factors(gate, weight))
    return out


class _ClampedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, limit: float, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        ctx.limit = limit
        return _forward(gate, up, limit, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, Tensor | None]:
        gate, up, weight = ctx.saved_tensors
        gate, up, factors = gate.contiguous(), up.contiguous(), _factors(gate, weight)
        d_gate, d_up, d_weight = torch.empty_like(gate), torch.empty_like(up), torch.empty_like(factors)
        inputs = (gate, up, ctx.limit, factors, grad.contiguous())
        cpu.kernels().swiglu_gradient(*inputs, d_gate, d_up, d_weight)
        return d_gate, d_up, None, d_weight.view_as(weight) if weight is not None else None


def clamped_swiglu(gate: Tensor, up: Tensor, limit: float, weight: Tensor | None = None) -> Tensor:
    """silu(min(gate, limit)) * clamp(up, +-limit) * weight: [n, width], [n, width], [n, 1] -> [n, width]."""
    op = _ClampedSwiGLU.apply if backends.records(gate, up, weight) else _forward
    return op(gate, up, limit, weight)
