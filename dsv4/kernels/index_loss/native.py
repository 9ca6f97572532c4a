"""The indexer's loss on the native kernels, with its gradient; fp32 on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv4.kernels import backends, cpu
from dsv4.kernels.attention.views import EntryView
from dsv4.kernels.rows import total


def index_loss(q: Tensor, weights: Tensor, keys: EntryView, chosen: Tensor | None, probs: Tensor) -> Tensor:
    """Sum over tokens of KL(attention over the entries || indexer), scalar."""
    picks = torch.empty(0, probs.shape[1], dtype=torch.int64) if chosen is None else chosen
    inputs = (q, weights, keys.pool.rows, keys, picks, probs.detach())
    if backends.records(q, weights, keys.pool.rows):
        return _IndexLoss.apply(*inputs)
    return _run(*inputs, with_gradients=False)[0]


def _run(
    q: Tensor, weights: Tensor, pool: Tensor, keys: EntryView, picks: Tensor, probs: Tensor, with_gradients: bool
) -> tuple[Tensor, list[Tensor]]:
    """(the sum of the losses, its gradients with respect to q, weights and pool)."""
    lengths, starts = keys.batch.lengths, keys.batch.starts
    count = int(((starts + lengths) // keys.ratio).sum())
    q, weights, pool = q.detach().contiguous(), weights.detach().contiguous(), pool.detach().contiguous()
    losses = q.new_empty(len(q))
    grads = [torch.empty_like(q), torch.empty_like(weights), torch.zeros_like(pool)] if with_gradients else []
    into = [*grads[:2], grads[2][:count]] if with_gradients else [None] * 3
    inputs = (q, weights, pool[:count], picks.contiguous(), probs.contiguous(), lengths, starts)
    cpu.kernels().index_loss(*inputs, losses, *into)
    # The kernel's relu takes NaN for zero; the loss must show it.
    return total(losses) + 0.0 * q.sum(), grads


class _IndexLoss(torch.autograd.Function):
    """The gradients are computed with the loss, which has the same scores."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, weights: Tensor, pool: Tensor, keys: EntryView, picks: Tensor, probs: Tensor
    ) -> Tensor:
        loss, grads = _run(q, weights, pool, keys, picks, probs, with_gradients=True)
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *(own * grad for own in ctx.saved_tensors), None, None, None
