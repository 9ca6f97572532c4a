"""Plain torch definition of top-k with ties to the lower index."""

from __future__ import annotations

import torch
from torch import Tensor


def _ordered_keys(scores: Tensor) -> Tensor:
    """int64 keys ordered by score, then lower index: monotone fp32 bits above the complemented index."""
    n = scores.shape[-1]
    bits = (scores + 0.0).view(torch.int32).long()  # + 0.0 turns -0 into +0, which must tie with it
    monotone = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    return (monotone << 32) | torch.arange(n - 1, -1, -1, device=scores.device)


def top_k_lowest_index(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest of each row of scores [..., n], k <= n -> int64 [..., k] ascending, -1 last."""
    n = scores.shape[-1]
    assert scores.dtype == torch.float32 and 0 < k <= n
    index = _ordered_keys(scores).topk(k, dim=-1, sorted=False).indices
    index = torch.where(scores.gather(-1, index) == float("-inf"), n, index).sort(dim=-1).values
    return torch.where(index == n, -1, index)
