"""Sampling in torch, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def filtered_probs(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Sampling distribution: float64 [vocab], zero outside the kept tokens, not renormalized."""
    # Subtracting the maximum first keeps a tiny temperature from overflowing.
    logits = logits.double()
    probs = ((logits - logits.max()) / temperature).softmax(dim=-1)
    if top_k == 0 and top_p == 1.0 and min_p == 0.0:
        return probs
    ordered, order = probs.sort(descending=True, stable=True)
    if top_k:
        ordered[top_k:] = 0.0
    if top_p < 1.0:
        mass_before = ordered.cumsum(dim=-1) - ordered
        ordered[mass_before >= top_p * ordered.sum()] = 0.0
    ordered[ordered < min_p * ordered[0]] = 0.0
    return torch.zeros_like(probs).scatter_(0, order, ordered)


def draw(probs: Tensor, u: float) -> int:
    """Inverse of the cumulative distribution at u in [0, 1). probs: float64 [vocab], not necessarily normalized."""
    cumulative = probs.cumsum(dim=-1)
    token_id = int(torch.searchsorted(cumulative, u * cumulative[-1], right=True))
    if token_id < probs.shape[0]:
        return token_id
    return int(probs.nonzero()[-1])  # rounding carried u past the end: the last token that may be drawn


def draw_token(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, u: float) -> int:
    """Sample a token id from logits [vocab], at u in [0, 1)."""
    return draw(filtered_probs(logits, temperature, top_k, top_p, min_p), u)
