"""Quantization-aware training: the forward uses the weights' stored values, the update goes to the fp32 masters.

A straight-through estimator outside the model: for one forward and backward the parameters hold their stored values
(FP4 routed experts, FP8 projections, BF16 embedding, head and norms), and the indexer's queries and keys are FP4, as
the published model computes its scores; then the masters return and receive the gradients unchanged.

In FP8 precision (kernels/precision.py) an expert's FP4 values go through FP8 blocks of 128 x 128 without loss if the
largest FP4 scale of a block is at most FP4_TO_FP8_RATIO times its smallest.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dsv4.kernels.quant import fake_quant_fp4, fake_quant_fp8_blocks
from dsv4.model.attention.indexer import Indexer
from dsv4.model.parameters import stored_dtype
from dsv4.parallel.fsdp import gathered_as

# 6 * 2^6 <= 448, and 0.5 * 2^-5 is e4m3's smallest normal number: scales of a block are 2^-5 to 2^6 of its FP8 scale.
FP4_TO_FP8_RATIO = 2.0**11
_ROUNDED = ("I8", "F8_E4M3", "BF16")
_MATRICES_AT_ONCE = 64


def as_stored(name: str, weight: Tensor) -> Tensor:
    """Round-trip of the parameter `name` through the official layout: the values read back after saving."""
    stored = weight.clone()
    _round_to_stored(name, stored)
    return stored


def round_weights(model: nn.Module) -> None:
    """Round every parameter of a model through the official layout, in place and for good."""
    for name, parameter in model.named_parameters():
        _round_to_stored(name, parameter)


@torch.no_grad()
def _round_to_stored(name: str, weight: Tensor) -> None:
    """As `as_stored`, in place; a second time changes nothing."""
    dtype = stored_dtype(name)
    if dtype == "I8":  # FP4; blocks do not cross rows
        for matrices in weight.split(_MATRICES_AT_ONCE):
            matrices.copy_(fake_quant_fp4(matrices))
    elif dtype == "F8_E4M3":
        weight.copy_(fake_quant_fp8_blocks(weight))
    elif dtype == "BF16":
        weight.copy_(weight.bfloat16())


@contextmanager
def stored_weights(model: nn.Module, indexers: bool = True) -> Iterator[None]:
    """Context in which the model's parameters hold their stored values, and indexers score in FP4; on exit the masters
    return, bit for bit.

    A model on several ranks (parallel/fsdp.py) has them where it is gathered, block by block; its root's group, which
    stays gathered, is gathered here.

    `indexers` False leaves indexers to the model's numerics, as an engine that serves the model does. An indexer whose
    width is no power of two, which the published numerics cannot rotate, stays as it is.
    """
    blocks = gathered_as(model, _round_to_stored)  # from here on their parameters are parts, all others whole
    whole = [(name, p) for name, p in model.named_parameters() if not isinstance(p, DTensor)]
    masters = [(name, p, p.data) for name, p in whole if stored_dtype(name) in _ROUNDED]
    exact = [m for m in model.modules() if isinstance(m, Indexer) and not m.quantizes and m.width.bit_count() == 1]
    rounded = exact if indexers else []
    try:
        for indexer in rounded:
            indexer.quantizes = True
        with torch.no_grad():
            for name, parameter, master in masters:
                parameter.data = as_stored(name, master)
        yield
    finally:
        for hook in blocks:
            hook.remove()
        for indexer in rounded:
            indexer.quantizes = False
        for _, parameter, master in masters:
            parameter.data = master
