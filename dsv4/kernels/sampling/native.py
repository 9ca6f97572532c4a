"""Sampling on the native kernels."""

from __future__ import annotations

from torch import Tensor

from dsv4.kernels import cpu


def draw_token(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, u: float) -> int:
    """Sample a token id from logits [vocab], at u in [0, 1)."""
    most = min(top_k, logits.shape[0])  # top_k may be too large for the kernel's integer
    token_id: int = cpu.kernels().sample(logits.detach().contiguous(), temperature, most, top_p, min_p, u)
    return token_id
