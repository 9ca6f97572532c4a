"""Gradients of each floating-point argument of each operation, on every rung, if no other requires one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv4.config import WINDOW
from dsv4.kernels import backends
from dsv4.kernels.attention import ENTRY_CHUNK, EntryView, KeyView, StoredRows, TileGroup, Tiles, attend
from dsv4.kernels.compressor import Windows, compress
from dsv4.kernels.cross_entropy import cross_entropy
from dsv4.kernels.grouped_linear import grouped_linear
from dsv4.kernels.hadamard import hadamard
from dsv4.kernels.index_loss import index_loss
from dsv4.kernels.linear import linear
from dsv4.kernels.mhc import hc_head, hc_post, hc_pre
from dsv4.kernels.norm import rms_norm
from dsv4.kernels.quant import fake_quant_fp4, fake_quant_fp8
from dsv4.kernels.rope import rotate
from dsv4.kernels.router import route_by_score, route_by_token
from dsv4.kernels.sinkhorn import sinkhorn
from dsv4.kernels.swiglu import clamped_swiglu
from dsv4.model.batch import RaggedBatch
from dsv4.model.layout import Layout

from ..model.tiny import tiny_config
from .tools import noise

# Operations whose results are indices. By contract, rope's factors and the router's bias take no gradient either.
WITHOUT_GRADIENT = {"topk", "indexer", "newton_schulz", "sampling"}
SIZES = tiny_config(hc_mult=2)


def _attend(q: Tensor, new: Tensor, ring: Tensor, pool: Tensor, sink: Tensor) -> Tensor:
    """One sequence in one tile: positions 4 to 9, after four keys in the ring, with an entry per four tokens."""
    batch = RaggedBatch.pack([[0] * 6], starts=[4])
    positions, blank = torch.arange(10), len(pool) - 1
    rows = torch.tensor([0, 1] + [blank] * (ENTRY_CHUNK - 2))
    group = TileGroup(0, 1, 0, ENTRY_CHUNK, rows, (positions[None, 4:] + 1) // 4, sparse=False)
    window = torch.cat((positions[:4], WINDOW + torch.arange(6)))
    mask = positions <= positions[4:, None]
    tiles = Tiles(torch.arange(6)[None], torch.arange(6), True, window[None], mask[None], [group])
    entries = EntryView(StoredRows(pool), 4, batch, np.zeros((1, 1), np.int64))
    return attend(q, KeyView(new, batch, StoredRows(ring), torch.tensor([0]), entries), tiles, sink)[0]


def _compress(kv: Tensor, score: Tensor, ape: Tensor) -> Tensor:
    batch, none = RaggedBatch.pack([[0] * 6]), torch.empty(0, dtype=torch.int64)
    source = torch.tensor([[6] * 4 + [0, 1, 2, 3]])  # no window before, which row 6 stands for
    windows = Windows(4, batch, torch.arange(6), source, None, None, torch.tensor([0]), none, none)
    entries = compress(kv, score, ape, windows)
    assert entries is not None
    return entries


def _index_loss(q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    layout = Layout(RaggedBatch.pack([[0] * 9]), None, torch.device("cpu"))
    view = EntryView(StoredRows(torch.cat((keys, keys.new_zeros(ENTRY_CHUNK, 8)))), 4, layout.batch, None)
    return index_loss(q, weights, view, layout.tiles(4, 8, 1 << 20), torch.full((9, 8), -1), noise(9, 8, seed=3).abs())


# (operation, one of its functions, the floating-point arguments).
CASES: list[tuple[str, Callable[..., Any], tuple[Tensor, ...]]] = [
    ("attention", _attend, (noise(6, 2, 8), noise(6, 8), noise(1, WINDOW, 8), noise(3, 8), noise(2))),
    ("compressor", _compress, (noise(6, 8), noise(6, 8), noise(4, 8))),
    ("cross_entropy", lambda x, w: cross_entropy(x, w, torch.tensor([1, 0, 3]))[0], (noise(3, 8), noise(4, 8))),
    ("grouped_linear", lambda x, weights: grouped_linear(x, [2, 3], weights), (noise(5, 8), noise(2, 4, 8))),
    ("hadamard", hadamard, (noise(3, 8),)),
    ("index_loss", _index_loss, (noise(9, 2, 8), noise(9, 2, seed=1), noise(2, 8, seed=2))),
    ("linear", linear, (noise(3, 8), noise(4, 8))),
    ("mhc", lambda x, fn, scale, base, norm: torch.cat([o.flatten() for o in hc_pre(x, fn, scale, base, norm, SIZES)]),
     (noise(3, 2, 8), noise(8, 16), noise(3), noise(8), noise(8))),
    ("mhc", hc_post, (noise(3, 8), noise(3, 2, 8), noise(3, 2), noise(3, 2, 2))),
    ("mhc", partial(hc_head, sizes=SIZES), (noise(3, 2, 8), noise(2, 16), noise(1), noise(2))),
    ("norm", lambda x, weight: rms_norm(x, 1e-6, weight), (noise(3, 8), noise(8))),
    ("quant", lambda x: fake_quant_fp8(x, 32), (noise(3, 32),)),
    ("quant", fake_quant_fp4, (noise(3, 32),)),
    ("rope", lambda x: rotate(x, noise(3, 4), noise(3, 4)), (noise(3, 8),)),
    ("router", lambda logits: route_by_score(logits, noise(6), 2, 1.0)[0], (noise(3, 6),)),
    ("router", lambda logits: route_by_token(logits, torch.tensor([[0, 1], [2, 3]]), torch.tensor([0, 1, 1]), 1.0)[0],
     (noise(3, 6),)),
    ("sinkhorn", lambda logits: sinkhorn(logits, 3, 1e-6), (noise(3, 2, 2),)),
    ("swiglu", lambda gate, up, weight: clamped_swiglu(gate, up, 5.0, weight), (noise(3, 8), noise(3, 8), noise(3, 1))),
]  # fmt: skip
EACH = [
    pytest.param(*case[1:], i, id=f"{case[0]}-{n}-{i}") for n, case in enumerate(CASES) for i in range(len(case[2]))
]


@pytest.mark.parametrize(("operation", "values", "number"), EACH)
def test_the_only_argument_that_requires_a_gradient_gets_one(
    rung: str, operation: Callable[..., Tensor], values: tuple[Tensor, ...], number: int
) -> None:
    arguments = [value.clone().requires_grad_(i == number) for i, value in enumerate(values)]
    (slope,) = torch.autograd.grad(operation(*arguments).square().sum(), arguments[number])
    assert slope.isfinite().all() and slope.any()


def test_every_operation_is_tested() -> None:
    assert {name for name, _, _ in CASES} | WITHOUT_GRADIENT == set(backends.NATIVE)
