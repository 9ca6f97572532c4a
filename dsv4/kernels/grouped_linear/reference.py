"""Plain torch definition of the grouped linear map, with its derivative."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dsv4.kernels.stored import widened


def _spans(sizes: list[int]) -> list[tuple[int, slice]]:
    spans, start = [], 0
    for group, size in enumerate(sizes):
        if size:
            spans.append((group, slice(start, start + size)))
            start += size
    return spans


def _forward(x: Tensor, sizes: list[int], weights: Sequence[Tensor]) -> Tensor:
    out = x.new_empty(x.shape[0], weights[0].shape[0])
    for rows, weight, into in zip(x.split(sizes), weights, out.split(sizes), strict=True):
        if len(rows):
            torch.mm(rows, widened(weight).t(), out=into)
    return out


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, *weights)
        ctx.sizes = sizes
        return _forward(x, sizes, weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        d_x = torch.empty_like(x)
        d_weights: list[Tensor | None] = [None] * len(weights)
        for group, rows in _spans(ctx.sizes):
            torch.mm(grad[rows], widened(weights[group]), out=d_x[rows])
            d_weights[group] = grad[rows].mT @ x[rows]
        return d_x, None, *d_weights


def grouped_linear(x: Tensor, sizes: list[int], weights: Sequence[Tensor]) -> Tensor:
    """Group g's rows of x [n, in] times weights[g] [out, in] transposed -> [n, out]."""
    return _GroupedLinear.apply(x, sizes, *weights) if torch.is_grad_enabled() else _forward(x, sizes, weights)
