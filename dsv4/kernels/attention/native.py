"""Attention on the native kernels, fp32 on the CPU: without a cache in one call, with its gradient; else sequence by
sequence. A sequence's earlier keys, received from other processes, lie before its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv4.config import WINDOW
from dsv4.kernels import backends, cpu
from dsv4.kernels.attention.views import KeyView
from dsv4.kernels.gather import with_earlier


def attend(
    q: Tensor, keys: KeyView, sink: Tensor, chosen: Tensor | None, keep_probs: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(o [T, H, D] of queries q [T, H, D], the entries' probabilities [T, k] if kept: without a cache alone)."""
    picks = every_entry(keys) if chosen is None else chosen
    if keys.cached:
        assert not keep_probs
        return _attend_cached(q, keys, sink, picks), None
    rows, batch = keys.new, keys.batch
    if keys.ring is not None:
        rows = with_earlier(keys.ring.take(keys.slots), rows, batch.lengths, batch.starts)
    pool = keys.entries.pool.rows if keys.entries is not None else rows.new_zeros(0, rows.shape[1])
    op = _Attend.apply if backends.records(q, rows, pool, sink) else _attend
    return op(q, rows, pool, sink, keys, picks, keep_probs)


def every_entry(keys: KeyView) -> Tensor:
    """The choice of a batch of which all tokens read all: for the kernels no rows, of the width of
    KeyView.most_chosen. int64 [0, k]."""
    return torch.empty(0, keys.most_chosen, dtype=torch.int64)


Shape = tuple[int, np.ndarray, np.ndarray]  # tokens per entry, 0 without entries; length and start of each sequence


def _shape(keys: KeyView) -> Shape:
    return keys.entries.ratio if keys.entries is not None else 0, keys.batch.lengths, keys.batch.starts


def _inputs(q: Tensor, rows: Tensor, pool: Tensor, sink: Tensor, picks: Tensor, shape: Shape) -> tuple[Any, ...]:
    """Arguments of the kernels: scaled queries, keys, entries, the choice, the shape, sink."""
    ratio, lengths, starts = shape
    entries = int(((starts + lengths) // ratio).sum()) if ratio else 0
    scaled = (q.detach() * q.shape[2] ** -0.5).contiguous()
    keys = (rows.detach().contiguous(), pool.detach()[:entries].contiguous())
    return scaled, *keys, picks.contiguous(), *shape, sink.detach()


def _attend(
    q: Tensor, rows: Tensor, pool: Tensor, sink: Tensor, keys: KeyView, picks: Tensor, keep_probs: bool
) -> tuple[Tensor, Tensor | None]:
    inputs = _inputs(q, rows, pool, sink, picks, _shape(keys))
    out = torch.empty_like(inputs[0])
    probs = out.new_empty(len(q), picks.shape[1]) if keep_probs else None
    cpu.kernels().attend_batch(*inputs, out, probs)
    return out, probs


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, rows: Tensor, pool: Tensor, sink: Tensor, keys: KeyView, picks: Tensor, keep_probs: bool
    ) -> tuple[Tensor, Tensor | None]:
        out, probs = _attend(q, rows, pool, sink, keys, picks, keep_probs)
        ctx.save_for_backward(q, rows, pool, sink, picks)
        ctx.shape = _shape(keys)
        if probs is not None:
            ctx.mark_non_differentiable(probs)
        return out, probs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        q, rows, pool, sink, picks = ctx.saved_tensors
        inputs = _inputs(q, rows, pool, sink, picks, ctx.shape)
        d_q, d_rows, d_sink = (torch.empty_like(t) for t in (inputs[0], inputs[1], inputs[-1]))
        d_pool = torch.zeros_like(pool)
        cpu.kernels().attend_gradient(*inputs, grad.contiguous(), d_q, d_rows, d_pool[: len(inputs[2])], d_sink)
        return d_q.mul_(q.shape[2] ** -0.5), d_rows, d_pool, d_sink, None, None, None


def _attend_cached(q: Tensor, keys: KeyView, sink: Tensor, picks: Tensor) -> Tensor:
    kernels, width, sink = cpu.kernels(), q.shape[2], sink.detach().contiguous()
    scaled, new = (q.detach() * width**-0.5).contiguous(), keys.new.detach().contiguous()
    out, no_ring, no_entries = torch.empty_like(scaled), new.new_zeros(WINDOW, width), new.new_zeros(0, width)
    ratio = keys.entries.ratio if keys.entries is not None else 0
    ends = np.cumsum(keys.batch.lengths)
    for i, (end, length, start) in enumerate(zip(ends, keys.batch.lengths, keys.batch.starts, strict=True)):
        rows = slice(end - length, end)
        ring = keys.ring.take(keys.slots[i]).float() if keys.ring is not None and i < len(keys.slots) else no_ring
        entries = keys.entries.of_sequence(i).detach().float() if keys.entries is not None else no_entries
        inputs = (scaled[rows], new[rows], ring, entries, picks[rows].contiguous(), ratio, int(start), sink)
        kernels.attend(*inputs, out[rows])
    return out
