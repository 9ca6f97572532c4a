"""One token from a row of logits.

Contract: logits fp32 [vocab], at least one of them finite; temperature > 0 divides them; top_k keeps the k likeliest
(0: all); top_p keeps the shortest run of likeliest tokens whose share of what top_k kept reaches top_p, so never fewer
than one; min_p drops tokens below min_p times the likeliest. Among equals the lower id counts as likelier. Then the
first token, in the order of the ids, at which the cumulative distribution is above u in [0, 1). Native: weights in
fp32, sums in float64; the reference has both in float64.
"""

from torch import Tensor

from dsv4.kernels import backends
from dsv4.kernels.sampling import native, reference


def draw_token(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, u: float) -> int:
    """A row of logits [vocab] -> a token id."""
    op = native if backends.uses_native("sampling", logits) else reference
    return op.draw_token(logits, temperature, top_k, top_p, min_p, u)


__all__ = ["draw_token"]
