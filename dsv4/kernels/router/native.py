"""The router on the native kernels; fp32 on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.kernels import cpu
from dsv4.kernels.router.reference import affinity


def route_by_score(logits: Tensor, bias: Tensor, k: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """(weights [T, k], index [T, k], scores [T, E]) of the k largest score + bias."""
    return _route(logits, bias.detach(), torch.zeros(len(logits), dtype=torch.int64), k, scale)


def route_by_token(logits: Tensor, table: Tensor, token_ids: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """(weights [T, k], index [T, k], scores [T, E]) of each token id's experts in the table [vocab, k]."""
    return _route(logits, table.contiguous(), token_ids, table.shape[1], scale)


def _route(logits: Tensor, choice: Tensor, token_ids: Tensor, k: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    logits = logits.detach().contiguous()
    weights, index = torch.empty(len(logits), k), torch.empty(len(logits), k, dtype=torch.int64)
    cpu.kernels().route(logits, choice, token_ids, scale, index, weights)
    return weights, index, affinity(logits)
