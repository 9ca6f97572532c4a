"""Sampling one token from a row of logits.

Contract: logits fp32 [vocab], at least one of them finite; temperature > 0 divides them; top_k keeps the k likeliest
tokens (0: all); top_p keeps the fewest likeliest tokens, at least one, whose share of the probability kept by top_k
reaches top_p; min_p drops tokens below min_p times the largest probability. Ties: the lower id counts as likelier.
Returns the first token, in the order of ids, whose cumulative probability exceeds u in [0, 1). Native: weights in fp32,
sums in float64; the reference has both in float64.
"""

from torch import Tensor

from dsv4.kernels import backends
from dsv4.kernels.sampling import native, reference


def draw_token(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, u: float) -> int:
    """Sample a token id from logits [vocab], at u in [0, 1)."""
    op = native if backends.uses_native("sampling", logits) else reference
    return op.draw_token(logits, temperature, top_k, top_p, min_p, u)


__all__ = ["draw_token"]
