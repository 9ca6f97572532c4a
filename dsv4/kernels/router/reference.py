"""The router in torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv4.kernels.topk import top_k_lowest_index

# Below it sigmoid and softplus are equal to rounding, and soon lose their bits as subnormal numbers.
_FAR_BELOW = -87.0


class _Affinity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        scores = (logits.clamp(min=0.0) + torch.log1p((-logits.abs()).exp())).sqrt()
        ctx.save_for_backward(logits, scores)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """The slope is sigmoid / (2 score), far below zero score / 2, since softplus is the square of the score."""
        logits, scores = ctx.saved_tensors
        far = (-logits.abs()).exp()
        pull = grad / (2.0 * scores)
        below = pull / (far + 1.0) * far
        return torch.where(logits < _FAR_BELOW, 0.5 * grad * scores, torch.where(logits > 0.0, pull - below, below))


def affinity(logits: Tensor) -> Tensor:
    """sqrt(softplus(logits)), fp32, stable at both ends."""
    return _Affinity.apply(logits)


def repeats(index: Tensor) -> Tensor:
    """Duplicates: index [T, k] -> bool [T, k], True if the same expert stands earlier in the row."""
    return (index.unsqueeze(-1) == index.unsqueeze(-2)).tril(-1).any(-1)


def route_by_score(logits: Tensor, bias: Tensor, k: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """(weights [T, k], index [T, k], scores [T, E]) of the k largest score + bias."""
    scores = affinity(logits)
    index = top_k_lowest_index(scores.detach() + bias, k)
    return _weights(scores, index, scale), index, scores


def route_by_token(logits: Tensor, table: Tensor, token_ids: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """(weights [T, k], index [T, k], scores [T, E]) of each token id's experts in the table [vocab, k]."""
    scores = affinity(logits)
    index = table[token_ids]
    return _weights(scores, index, scale).masked_fill(repeats(index), 0.0), index, scores


def _weights(scores: Tensor, index: Tensor, scale: float) -> Tensor:
    chosen = scores.gather(1, index)
    return chosen / (chosen.sum(-1, keepdim=True) + 1e-20) * scale
