"""Compression on the native kernels, fp32 on the CPU: without a cache in one call, with its gradient; else sequence by
sequence. Rows of earlier tokens that other processes hold lie before a sequence's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv4.kernels import backends, cpu
from dsv4.kernels.compressor.views import Windows
from dsv4.kernels.gather import take_rows, with_earlier


def compress(kv: Tensor, score: Tensor, ape: Tensor, windows: Windows) -> Tensor | None:
    """Entries [windows, width] from the projections kv, score [T, total]; writes the state."""
    state_kv, state_score = windows.state_kv, windows.state_score
    if windows.writes_state and state_kv is not None and state_score is not None:
        return _continue(kv, score, ape, windows, state_kv, state_score)
    if not windows.source.shape[0]:
        return None
    score = score + take_rows(ape, windows.positions % windows.ratio)
    if state_kv is not None and state_score is not None:
        slots, sequences = windows.state_slots, (windows.batch.lengths, windows.batch.starts)
        kv = with_earlier(take_rows(state_kv, slots), kv, *sequences)
        score = with_earlier(take_rows(state_score, slots), score, *sequences)
    return (_Pool.apply if backends.records(kv, score) else _pool)(kv, score, windows)


def _pool(kv: Tensor, score: Tensor, windows: Windows) -> Tensor:
    width = kv.shape[1] // 2 if windows.overlap else kv.shape[1]
    entries = kv.new_empty(windows.source.shape[0], width)
    inputs = (kv.detach().contiguous(), score.detach().contiguous(), windows.batch.lengths, windows.batch.starts)
    cpu.kernels().compress_batch(windows.ratio, *inputs, entries)
    return entries


class _Pool(torch.autograd.Function):
    """Entries from kv and score, ape included, of sequences' earlier tokens and their own."""

    @staticmethod
    def forward(ctx: Any, kv: Tensor, score: Tensor, windows: Windows) -> Tensor:
        ctx.save_for_backward(kv, score)
        ctx.ratio, ctx.sequences = windows.ratio, (windows.batch.lengths, windows.batch.starts)
        return _pool(kv, score, windows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        kv, score = (t.contiguous() for t in ctx.saved_tensors)
        d_kv, d_score = torch.empty_like(kv), torch.empty_like(score)
        cpu.kernels().compress_gradient(ctx.ratio, kv, score, *ctx.sequences, grad.contiguous(), d_kv, d_score)
        return d_kv, d_score, None


def _continue(
    kv: Tensor, score: Tensor, ape: Tensor, windows: Windows, state_kv: Tensor, state_score: Tensor
) -> Tensor | None:
    kernels, batch, ratio, slots = cpu.kernels(), windows.batch, windows.ratio, windows.slots
    total = kv.shape[1]
    kv, score, ape = kv.detach().contiguous(), score.detach().clone(), ape.detach().contiguous()
    made: list[Tensor] = []
    ends = np.cumsum(batch.lengths)
    for i, (end, length, start) in enumerate(zip(ends, batch.lengths, batch.starts, strict=True)):
        rows = slice(end - length, end)
        state = state_kv[batch.slots[i]], state_score[batch.slots[i]]
        # The state is a ring: `start` less whole turns addresses the same rows and needs room for fewer entries.
        first = int(start - max(start // slots - 1, 0) * slots)
        entries = kv.new_empty((first + int(length)) // ratio, total // 2 if windows.overlap else total)
        kernels.compress(ratio, kv[rows], score[rows], ape, first, *state, entries)
        made.append(entries[first // ratio :])
    entries = torch.cat(made)
    return entries if len(entries) else None
