"""Lightning indexer's choice: the k compressed entries that each token of a ragged batch reads.

Contract: q [T, heads, width], weights [T, heads], keys an EntryView of index keys (kernels/attention/views.py)
-> chosen int64 [T, k], ascending, -1 behind: of the entries that a token sees the k with the largest
sum_h weights[h] * relu(q[h] . key), the lower one among equals. Rows of tokens that see at most k may stay empty (-1):
they read all. None where no token may see more than k. Scores are fp32, under autocast too: they decide the choice.
When asked, the reference also gives the scores of each tile group [tiles, rows, entries], for the indexer's loss; they
are differentiable, the choice is not.
"""

from torch import Tensor

from dsv4.kernels import backends
from dsv4.kernels.attention.views import EntryView, Tiles
from dsv4.kernels.indexer import native, reference


def select_entries(
    q: Tensor, weights: Tensor, keys: EntryView, tiles: Tiles, k: int, keep_scores: bool = False
) -> tuple[Tensor | None, list[Tensor | None]]:
    """(chosen [T, k] or None, a list per tile group of its scores, empty unless kept)."""
    if not keep_scores and backends.uses_native("indexer", q, weights, keys.pool):
        return native.select_entries(q, weights, keys, k), []
    return reference.select_entries(q, weights, keys, tiles, k, keep_scores)


__all__ = ["select_entries"]
