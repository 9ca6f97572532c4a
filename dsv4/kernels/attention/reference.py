"""Windowed plus compressed attention with a sink in torch: keys gathered tile by tile, then one softmax."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4.kernels.attention.views import KeyView, StoredRows, TileGroup, Tiles
from dsv4.kernels.gather import take_rows

ENTRY_CHUNK = 64


@dataclass(frozen=True)
class Probabilities:
    """Probabilities of the softmax of one tile group, G tiles of R rows, summed over heads when they are asked for.

    With those of the sink they add up to the number of heads. The fields are exponentials [G, R, H, n] and their sum.
    """

    window_exps: Tensor
    entry_exps: Tensor | None
    sink_exps: Tensor
    total: Tensor

    def window(self) -> Tensor:
        """Of the group's window slots, [G, R, W]."""
        return (self.window_exps / self.total).sum(2)

    def entries(self) -> Tensor | None:
        """Of the entries, [G, R, E]; None for a group without entries."""
        return None if self.entry_exps is None else (self.entry_exps / self.total).sum(2)

    def sink(self) -> Tensor:
        """Of the sink, [G, R]."""
        return (self.sink_exps / self.total).sum(2).squeeze(-1)


def attend(
    q: Tensor, keys: KeyView, tiles: Tiles, sink: Tensor, chosen: Tensor | None = None, keep_probs: bool = False
) -> tuple[Tensor, list[Probabilities]]:
    """(o [T, H, D], probabilities per tile group if kept)."""
    window = _window_rows(keys)
    outputs: list[Tensor] = []
    kept: list[Probabilities] = []
    for group in tiles.groups:
        part, seen = slice(group.first, group.last), slice(group.window_skip, None)
        window_keys = take_rows(window, tiles.window_index[part, seen])
        args = (tiles.rows(q, group), window_keys, tiles.window_mask[part, :, seen], sink)
        if group.num_entries == 0 or keys.entries is None:
            out, probs = attend_tiles(*args, keep_probs=keep_probs)
        else:
            mask, index = group.visible(tiles.rows(chosen, group) if group.sparse and chosen is not None else None)
            picked = _gather(keys.entries.pool, group, index)
            out, probs = attend_tiles(*args, picked, mask, keep_probs)
        outputs.append(out)
        if probs is not None:
            kept.append(probs)
    return tiles.tokens(torch.cat(outputs) if len(outputs) > 1 else outputs[0]), kept


def token_probs(probs: list[Tensor | None], tiles: Tiles, k: int) -> Tensor:
    """Probabilities per tile group as [T, k], without gradient: no token reads more than k entries."""
    parts: list[Tensor] = []
    for group, own in zip(tiles.groups, probs, strict=True):
        rows = tiles.row_token.new_zeros((*group.num_visible.shape, k), dtype=torch.float32)
        if own is not None:
            count = min(k, own.shape[-1])
            rows[..., :count] = own.detach()[..., :count]
        parts.append(rows)
    return tiles.tokens(torch.cat(parts))


def _window_rows(keys: KeyView) -> Tensor:
    """Rows that window_index points into: the rings of the batch's sequences, the new keys, one zero row."""
    width = keys.new.shape[1]
    parts = [keys.new, keys.new.new_zeros(1, width)]
    if keys.ring is not None:
        parts.insert(0, keys.ring.take(keys.slots).view(-1, width).to(keys.new.dtype))
    return torch.cat(parts)


def _gather(pool: StoredRows, group: TileGroup, index: Tensor | None) -> Tensor:
    """Entries that a group reads: [E, D] or [G, E, D]; with `index` (their numbers), each row's own [G, R, k, D]."""
    assert group.entries is not None
    if index is None:
        return pool.take(group.entries)
    if isinstance(group.entries, slice):
        return pool.take(index + group.entries.start)
    if group.entries.dim() == 1:
        return pool.take(group.entries[index])
    tile = torch.arange(index.shape[0], device=index.device)[:, None, None]
    return pool.take(group.entries[tile, index])


def attend_tiles(
    q: Tensor,
    window: Tensor,
    window_mask: Tensor,
    sink: Tensor,
    entries: Tensor | None = None,
    entry_mask: Tensor | None = None,
    keep_probs: bool = False,
) -> tuple[Tensor, Probabilities | None]:
    """One softmax over gathered window keys, entries and the sink -> (o [G, R, H, D] like q, probabilities or None).

    q [G, R, H, D]; window [G, W, D]; window_mask bool [G, R, W]; entries either shared [E, D] (all tiles belong to one
    sequence), per tile [G, E, D], or per row [G, R, E, D]; entry_mask bool [G, R, E]; E a multiple of ENTRY_CHUNK
    unless per row.
    """
    G, R, H, D = q.shape
    scale = D**-0.5
    rows = q.float().reshape(G, R * H, D) * scale
    window = window.float()
    neg_inf = float("-inf")

    score_w = torch.bmm(rows, window.mT).view(G, R, H, -1).masked_fill_(~window_mask[:, :, None], neg_inf)
    sink_row = sink.float().view(1, 1, H, 1)
    top = torch.maximum(score_w.detach().amax(-1, keepdim=True), sink_row.detach())
    score_e = None
    if entries is not None:
        assert entry_mask is not None
        entries = entries.float()
        score_e = _entry_scores(rows, entries, G, R, H).masked_fill_(~entry_mask[:, :, None], neg_inf)
        top = torch.maximum(top, score_e.detach().amax(-1, keepdim=True))

    p_w = (score_w - top).exp_()
    p_sink = (sink_row - top).exp_()
    total = p_w.sum(-1, keepdim=True) + p_sink
    out = torch.bmm(p_w.view(G, R * H, -1), window)
    p_e = None
    if score_e is not None:
        assert entries is not None
        p_e = (score_e - top).exp_()
        if entries.dim() == 4:
            values = torch.bmm(p_e.view(G * R, H, -1), entries.flatten(0, 1))
            out, total = out + values.view(G, R * H, D), total + p_e.sum(-1, keepdim=True)
        else:
            out, total = _add_chunks(out, total, p_e, entries)
    out = out.view(G, R, H, D) / total
    return out.to(q.dtype), Probabilities(p_w, p_e, p_sink, total) if keep_probs else None


def _entry_scores(rows: Tensor, entries: Tensor, G: int, R: int, H: int) -> Tensor:
    if entries.dim() == 2:
        return (rows.flatten(0, 1) @ entries.mT).view(G, R, H, -1)
    if entries.dim() == 3:
        return torch.bmm(rows, entries.mT).view(G, R, H, -1)
    return torch.bmm(rows.reshape(G * R, H, -1), entries.flatten(0, 1).mT).view(G, R, H, -1)


def _add_chunks(out: Tensor, total: Tensor, p: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Add p [G, R, H, E] times values ([E, D] or [G, E, D]) to out, and p's sums to total, ENTRY_CHUNK at a time."""
    G, R, H, E = p.shape
    flat = p.view(G, R * H, E)
    for start in range(0, E, ENTRY_CHUNK):
        part = slice(start, start + ENTRY_CHUNK)
        if values.dim() == 2:
            out = out + (flat[..., part].flatten(0, 1) @ values[part]).view(G, R * H, -1)
        else:
            out = torch.baddbmm(out, flat[..., part], values[:, part])
        total = total + p[..., part].sum(-1, keepdim=True)
    return out, total
