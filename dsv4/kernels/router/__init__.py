"""Experts and weights of each token: by token id in hash layers, else the k largest score + bias.

Contract: logits fp32 [T, E]; either bias fp32 [E], which affects the choice and not the weights, or table int64
[vocab, k] of experts by token id, with token_ids int64 [T]
-> (weights fp32 [T, k], index int64 [T, k], scores fp32 [T, E]).
score = sqrt(softplus(logit)); weight = score / (sum of the chosen scores + 1e-20) * scale. Ties go to the lower index.
A chosen row ascends, a table's row keeps its order. An expert repeated in a table's row counts in the sum each time,
but its output once, as in the published code, whose `y[rows] += ...` adds once per row: later repeats weigh 0.
Native: the values of the scores, read by the balance loss only, come from the reference.
"""

from torch import Tensor

from dsv4.kernels import backends
from dsv4.kernels.router import native, reference


def route_by_score(logits: Tensor, bias: Tensor, k: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """(weights [T, k], index [T, k], scores [T, E]) of the k largest score + bias."""
    op = native if backends.uses_native("router", logits, bias) else reference
    return op.route_by_score(logits, bias, k, scale)


def route_by_token(logits: Tensor, table: Tensor, token_ids: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """(weights [T, k], index [T, k], scores [T, E]) of each token id's experts in the table [vocab, k]."""
    op = native if backends.uses_native("router", logits) else reference
    return op.route_by_token(logits, table, token_ids, scale)


__all__ = ["route_by_score", "route_by_token"]
