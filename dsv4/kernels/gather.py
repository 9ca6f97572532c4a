"""Gathers of rows with fast gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def take_rows(rows: Tensor, index: Tensor) -> Tensor:
    """rows [n, ...] at int64 index [...] -> [..., *rows.shape[1:]]. On CPUs rows[index] has a far slower gradient."""
    return F.embedding(index, rows.flatten(1)).view(*index.shape, *rows.shape[1:])


def with_earlier(rings: Tensor, rows: Tensor, lengths: np.ndarray, starts: np.ndarray) -> Tensor:
    """rows [T, width] of sequences end to end, each after the rows of its last earlier tokens, `size` - 1 at most.

    rings [n, size, width], of the first n sequences: position p in row p % size. The result depends on every ring, even
    on one of which no row is read.
    """
    size, parts, done = rings.shape[1], [], 0
    for ring, first, start in zip(rings, np.cumsum(lengths) - lengths, starts, strict=False):
        if first > done:
            parts.append(rows[done:first])
            done = first
        places = np.arange(max(0, start - size + 1), start) % size
        parts.append(take_rows(ring, torch.from_numpy(places).to(ring.device)))
    return torch.cat((*parts, rows[done:] if done else rows))


class Dispatch:
    """Tokens' rows sorted by expert, and back: gathers in both directions, since every (token, slot) has one row."""

    def __init__(self, index: Tensor) -> None:
        """index int64 [T, k]: expert of each slot of a token. A token's rows keep its order within an expert."""
        self.shape = index.shape
        self.order = index.flatten().argsort(stable=True)  # slot of each row
        self.slots = torch.empty_like(self.order)  # row of each slot
        self.slots[self.order] = torch.arange(len(self.order), device=index.device)
        self.token = self.order // index.shape[1]  # token of each row

    def sort(self, x: Tensor) -> Tensor:
        """Rows [T * k, d], sorted by expert, of tokens x [T, d]."""
        return _Sort.apply(x, self)

    def sort_slots(self, values: Tensor) -> Tensor:
        """Values [T, k] of the slots, as those of the rows [T * k]."""
        return _SortSlots.apply(values, self)

    def add_slots(self, x: Tensor, rows: Tensor) -> Tensor:
        """x [T, d] plus each token's rows [T * k, d], in the order of its slots."""
        return _AddSlots.apply(x, rows, self)

    def by_token(self, rows: Tensor) -> Tensor:
        """rows [T * k, ...] as [T, k, ...], without a gradient."""
        return rows.index_select(0, self.slots).view(*self.shape, *rows.shape[1:])


class _Sort(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dispatch: Dispatch) -> Tensor:
        ctx.dispatch = dispatch
        return x.index_select(0, dispatch.token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.dispatch.by_token(grad).sum(1), None


class _SortSlots(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, dispatch: Dispatch) -> Tensor:
        ctx.dispatch = dispatch
        return values.flatten().index_select(0, dispatch.order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.dispatch.by_token(grad), None


class _AddSlots(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, dispatch: Dispatch) -> Tensor:
        ctx.dispatch = dispatch
        out = x.clone()
        for slot in dispatch.by_token(rows).unbind(1):
            out += slot
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, grad.index_select(0, ctx.dispatch.token), None
