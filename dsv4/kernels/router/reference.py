"""The router in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.kernels.topk import top_k_lowest_index


def affinity(logits: Tensor) -> Tensor:
    """sqrt(softplus(logits)), fp32, stable at both ends."""
    return (logits.clamp(min=0.0) + torch.log1p((-logits.abs()).exp())).sqrt()


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
