"""Plain torch definition of the indexer's loss, tile group by tile group."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.kernels.attention.views import EntryView, TileGroup, Tiles
from dsv4.kernels.indexer.reference import index_scores


def index_loss(
    q: Tensor, weights: Tensor, keys: EntryView, tiles: Tiles, chosen: Tensor | None, probs: Tensor
) -> Tensor:
    """Sum over tokens of KL(attention over the entries || indexer), scalar."""
    total = torch.zeros((), device=q.device)
    for group in tiles.groups:
        if group.num_entries == 0 or group.entries is None:
            continue
        scores = index_scores(tiles.rows(q, group), tiles.rows(weights, group), keys.pool.take(group.entries))
        picks = tiles.rows(chosen, group) if chosen is not None else None
        total = total + _group_kl(tiles.rows(probs, group), scores, group, picks).sum()
    return total


def _group_kl(probs: Tensor, scores: Tensor, group: TileGroup, chosen: Tensor | None) -> Tensor:
    """`indexer_kl` over the entries read by a tile group: probs [G, R, k], all scores [G, R, entries] -> [G, R].

    chosen [G, R, k]: the entries chosen by the rows of a sparse group.
    """
    mask, index = group.visible(chosen)
    if index is not None:
        scores = scores.gather(-1, index.clamp(max=scores.shape[-1] - 1))
    count = min(probs.shape[-1], scores.shape[-1])
    return indexer_kl(probs.detach()[..., :count], scores[..., :count], mask[..., :count])


def indexer_kl(probs: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
    """KL(attention over the entries, summed over heads and renormalized || softmax of the index scores), [G, R].

    probs, scores fp32 [G, R, E]; rows that see no entry give 0.
    """
    probs = probs / probs.sum(-1, keepdim=True).clamp(min=1e-20)
    log_q = torch.log_softmax(scores.masked_fill(~mask, -1e30), dim=-1)
    terms = probs * (probs.clamp(min=1e-20).log() - log_q)
    return terms.masked_fill(~mask, 0.0).sum(-1)
