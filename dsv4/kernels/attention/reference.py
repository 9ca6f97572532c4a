"""Plain torch definition of windowed plus compressed attention with a sink."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.kernels.autocast import without_autocast

ENTRY_CHUNK = 64


@without_autocast
def attend(
    q: Tensor,
    window: Tensor,
    window_mask: Tensor,
    sink: Tensor,
    entries: Tensor | None = None,
    entry_mask: Tensor | None = None,
    return_entry_probs: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """One softmax over window slots, compressed entries and the sink; see the package docstring for the shapes."""
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
    total = p_w.sum(-1, keepdim=True) + (sink_row - top).exp_()
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
    probs = (p_e / total).sum(2) if return_entry_probs and p_e is not None else None
    return out.to(q.dtype), probs


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
