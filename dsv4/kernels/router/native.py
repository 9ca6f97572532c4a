"""The router on the native kernels, with its gradient; fp32 on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv4.kernels import backends, cpu
from dsv4.kernels.router.reference import affinity


def route_by_score(logits: Tensor, bias: Tensor, k: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """(weights [T, k], index [T, k], scores [T, E]) of the k largest score + bias."""
    return _route(logits, bias.detach().contiguous(), torch.zeros(len(logits), dtype=torch.int64), k, scale)


def route_by_token(logits: Tensor, table: Tensor, token_ids: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """(weights [T, k], index [T, k], scores [T, E]) of each token id's experts in the table [vocab, k]."""
    return _route(logits, table.contiguous(), token_ids, table.shape[1], scale)


def _route(logits: Tensor, choice: Tensor, token_ids: Tensor, k: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    op = _Route.apply if backends.records(logits) else _forward
    return op(logits, choice, token_ids, k, scale)


def _forward(logits: Tensor, choice: Tensor, token_ids: Tensor, k: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    logits = logits.detach().contiguous()
    weights, index = torch.empty(len(logits), k), torch.empty(len(logits), k, dtype=torch.int64)
    cpu.kernels().route(logits, choice, token_ids, scale, index, weights)
    return weights, index, affinity(logits)


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, choice: Tensor, token_ids: Tensor, k: int, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        weights, index, scores = _forward(logits, choice, token_ids, k, scale)
        ctx.save_for_backward(logits, index)
        ctx.mark_non_differentiable(index)
        ctx.set_materialize_grads(False)
        ctx.scale = scale
        return weights, index, scores

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_weights: Tensor | None, _: None, d_scores: Tensor | None
    ) -> tuple[Tensor, None, None, None, None]:
        logits, index = ctx.saved_tensors
        logits = logits.contiguous()
        d_weights = torch.zeros(index.shape) if d_weights is None else d_weights.contiguous()
        d_scores = d_scores.contiguous() if d_scores is not None else None
        d_logits = torch.empty_like(logits)
        cpu.kernels().route_gradient(logits, index, ctx.scale, d_weights, d_scores, d_logits)
        return d_logits, None, None, None, None
