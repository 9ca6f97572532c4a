"""Sampling on the native kernels."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from dsv4.kernels import cpu


def draw_token(
    logits: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    key: int,
    allowed: np.ndarray | None = None,
) -> int:
    """Sample a token id from logits [vocab] with the noise of `key`."""
    row = logits.detach().numpy()  # which the binding takes in a fraction of a tensor's time
    if not row.flags.c_contiguous:
        row = np.ascontiguousarray(row)
    most = min(top_k, row.shape[0])  # top_k may be too large for the kernel's integer
    return cpu.kernels().sample(row, allowed, temperature, most, top_p, min_p, key)


def likeliest_token(logits: Tensor, allowed: np.ndarray | None = None) -> int:
    """The largest logit that is allowed, the lower id among equals."""
    if allowed is None:
        return int(logits.numpy().argmax())
    return draw_token(logits, 0.0, 0, 1.0, 0.0, 0, allowed)
