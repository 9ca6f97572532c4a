"""Top-k with ties to the lower index on the native kernels; fp32 on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.kernels import cpu


def top_k_lowest_index(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest of each row of scores [..., n], k <= n -> int64 [..., k] ascending, -1 last."""
    n = scores.shape[-1]
    rows = scores.detach().reshape(-1, n).contiguous()
    index = torch.empty(len(rows), k, dtype=torch.int64)
    cpu.kernels().top_k(rows, k, index)
    # The kernel fills a row up with indices whose score is -inf.
    index = torch.where(rows.gather(1, index) == float("-inf"), n, index).sort(dim=1).values
    return torch.where(index == n, -1, index).view(*scores.shape[:-1], k)
