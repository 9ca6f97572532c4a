"""Lightning indexer's choice: the k compressed entries that each token of a ragged batch reads.

Contract: q [T, heads, width], weights [T, heads], keys an EntryView of index keys (kernels/attention/views.py)
-> chosen int64 [T, k], ascending, padded with -1: among the entries that a token sees, the k with the largest
sum_h weights[h] * relu(q[h] . key); ties go to the lower index. The row of a token that sees at most k may be all -1:
the token reads all. None if no token may see more than k. Scores are fp32: they decide the choice.
The choice has no gradient. On request the reference also returns the scores per tile group [tiles, rows, entries].
"""

import torch
from torch import Tensor

from dsv4.kernels import backends
from dsv4.kernels.attention.views import EntryView, Tiles
from dsv4.kernels.indexer import native, reference


def select_entries(
    q: Tensor, weights: Tensor, keys: EntryView, tiles: Tiles, k: int, keep_scores: bool = False
) -> tuple[Tensor | None, list[Tensor | None]]:
    """(chosen [T, k] or None, scores per tile group if kept)."""
    q, weights, fresh = q.detach(), weights.detach(), keys.pool.fresh
    fresh = fresh.detach() if fresh is not None else None
    if not keep_scores and backends.uses_native("indexer", q, weights, fresh):
        return native.select_entries(q, weights, keys, k), []
    with torch.no_grad():
        return reference.select_entries(q, weights, keys, tiles, k, keep_scores)


__all__ = ["select_entries"]
