"""Sampling on the native kernels."""

from __future__ import annotations

from torch import Tensor

from dsv4.kernels import cpu


def draw_token(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, u: float) -> int:
    """A row of logits [vocab] -> a token id."""
    most = min(top_k, logits.shape[0])  # any Python number is allowed
    token_id: int = cpu.kernels().sample(logits.detach().contiguous(), temperature, most, top_p, min_p, u)
    return token_id
