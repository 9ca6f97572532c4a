"""Sampling one token from a row of logits.

Contract: logits fp32 [vocab], at least one of them finite, none NaN or +inf. `allowed`, uint32 [ceil(vocab / 32)]: a
bit per token, token 0 in the lowest bit of word 0; the others are as if their logit were -inf. temperature > 0 divides
logits; top_k keeps the k likeliest tokens (0: all); top_p keeps the fewest likeliest tokens, at least one, whose share
of the probability kept by top_k reaches top_p; min_p drops tokens below min_p times the largest probability. Ties: the
lower id counts as likelier.

Returns, of the tokens kept, the one with the largest logit / temperature + noise, the lower id among equals. The noise
-ln(-ln u) depends on (key, token id) alone: u = (52 bits + 1/2) / 2^52 of number `id` of the SplitMix64 stream that
begins at `key` (Steele, Lea, Flood 2014). By the Gumbel-max trick that is a draw from the softmax of the tokens kept.
Two rows with the same key agree far more often than independent draws would. Where the noise is lost in rounding, as at
a temperature of 1e-30, the largest logit is drawn.

Bits: all rungs return the same token. Sums and noise are in float64, the logarithm a fixed sequence of operations
without fused ones. What the filters compare are fp32 weights by another such sequence, and sums of these in whole
multiples of 2^-35 of the largest, which are exact in any order.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dsv4.kernels import backends
from dsv4.kernels.sampling import native, reference


def draw_token(
    logits: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    key: int,
    allowed: np.ndarray | None = None,
) -> int:
    """Sample a token id from logits [vocab] with the noise of `key`, in [0, 2^64)."""
    op = native if backends.uses_native("sampling", logits) else reference
    return op.draw_token(logits, temperature, top_k, top_p, min_p, key, allowed)


def likeliest_token(logits: Tensor, allowed: np.ndarray | None = None) -> int:
    """The largest logit that is allowed, the lower id among equals."""
    op = native if backends.uses_native("sampling", logits) else reference
    return op.likeliest_token(logits, allowed)


def kept_tokens(
    logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, allowed: np.ndarray | None = None
) -> Tensor:
    """Tokens that `draw_token` may return, bool [vocab]: the same set for all rungs, so computed by the reference."""
    if allowed is not None:
        logits = reference.mask_tokens(logits, allowed)
    return reference.kept_tokens(logits, temperature, top_k, top_p, min_p) & (logits > -torch.inf)


def pack_mask(kept: Tensor) -> bytes:
    """A mask bool [vocab] as ceil(vocab / 8) bytes, token 0 in the lowest bit of the first."""
    return np.packbits(kept.cpu().numpy(), bitorder="little").tobytes()


def unpack_masks(packed: Tensor, vocab: int) -> Tensor:
    """Masks of `pack_mask`, uint8 [n, bytes], as bool [n, vocab]."""
    bits = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> bits) & 1).flatten(-2)[..., :vocab].bool()


__all__ = ["draw_token", "kept_tokens", "likeliest_token", "pack_mask", "unpack_masks"]
