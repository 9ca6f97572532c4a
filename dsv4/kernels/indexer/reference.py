"""The indexer's scores and choice in torch, tile group by tile group."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.kernels.attention.views import EntryView, Tiles
from dsv4.kernels.topk import top_k_lowest_index

SCORE_CHUNK = 4096


def select_entries(
    q: Tensor, weights: Tensor, keys: EntryView, tiles: Tiles, k: int, keep_scores: bool = False
) -> tuple[Tensor | None, list[Tensor | None]]:
    """(chosen [T, k] or None if no group is sparse, scores [tiles, rows, entries] per group if kept)."""
    chosen: list[Tensor] = []
    kept: list[Tensor | None] = []
    for group in tiles.groups:
        scores = None
        if group.num_entries and (group.sparse or keep_scores):
            assert group.entries is not None
            rows = tiles.rows(q, group), tiles.rows(weights, group)
            scores = index_scores(*rows, keys.pool.take(group.entries))
        if group.sparse and scores is not None:
            chosen.append(select(scores.detach(), group.num_visible, k))
        else:
            chosen.append(group.num_visible.new_full((*group.num_visible.shape, k), -1))
        kept.append(scores if keep_scores else None)
    if not any(group.sparse for group in tiles.groups):
        return None, kept
    return tiles.tokens(torch.cat(chosen) if len(chosen) > 1 else chosen[0]), kept


def select(scores: Tensor, num_visible: Tensor, k: int) -> Tensor:
    """Top k visible entries per row: scores [..., n], num_visible [...] -> int64 [..., k] ascending, -1 last."""
    n = scores.shape[-1]
    hidden = torch.arange(n, device=scores.device) >= num_visible.unsqueeze(-1)
    scores = scores.masked_fill(hidden, float("-inf"))
    if n < k:
        scores = torch.nn.functional.pad(scores, (0, k - n), value=float("-inf"))
    return top_k_lowest_index(scores, k)


def index_scores(q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    """sum_h weights[h] * relu(q[h] . key): q [..., h, D], weights [..., h], keys [..., n, D] or one [n, D] -> [..., n].

    fp32: the scores decide the choice. Keys are taken SCORE_CHUNK at a time, so memory does not
    grow with heads times context.
    """
    lead, heads = q.shape[:-2], q.shape[-2]
    # Two equal rows: a batched product with a single row takes another path through the BLAS, with other rounding.
    mix = weights.float().unsqueeze(-2).expand(*lead, 2, heads).reshape(-1, 2, heads)
    parts = []
    for start in range(0, keys.shape[-2], SCORE_CHUNK):
        part = keys[..., start : start + SCORE_CHUNK, :].float()
        if keys.dim() == 2:
            dots = q.reshape(-1, q.shape[-1]).float() @ part.mT
        else:
            dots = torch.bmm(q.float().flatten(1, -2), part.mT)
        dots = dots.relu_().view(-1, heads, part.shape[-2])
        parts.append(torch.bmm(mix, dots)[:, 0].view(*lead, -1))
    return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
