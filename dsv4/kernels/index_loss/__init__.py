"""The indexer's loss: it learns the probabilities that attention gives to the entries that a token reads.

Contract: q [T, heads, width], weights [T, heads], keys an EntryView of index keys without a cache, tiles the
reference's cut; chosen int64 [T, k] or None, as for attention; probs fp32 [T, k], of the entries that a token reads, in
order, as attention returns them -> scalar fp32: the sum over the tokens of KL(probs || softmax of the entries' index
scores), probs divided by their sum. A token that sees no entry adds 0. Scores as in kernels/indexer,
fp32; gradients of q, weights and the keys, none of probs. Source: DeepSeek-V3.2 report, indexer
warm-up.
"""

from torch import Tensor

from dsv4.kernels import backends
from dsv4.kernels.attention.views import EntryView, Tiles
from dsv4.kernels.index_loss import native, reference


def index_loss(
    q: Tensor, weights: Tensor, keys: EntryView, tiles: Tiles, chosen: Tensor | None, probs: Tensor
) -> Tensor:
    """Sum over tokens of KL(attention over the entries || indexer), scalar."""
    if keys.block_table is None and backends.uses_native("index_loss", q, weights, keys.pool.fresh, probs):
        return native.index_loss(q, weights, keys, chosen, probs)
    return reference.index_loss(q, weights, keys, tiles, chosen, probs)


__all__ = ["index_loss"]
