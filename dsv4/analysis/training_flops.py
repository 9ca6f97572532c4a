"""FLOPs of training on documents, 2 per multiply-add: those of the model, without recomputation and the optimizer.

Of a run that trains adapters alone: without gradients of the frozen weights, with the adapters' products.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from dsv4.analysis.adapters import Adapters
from dsv4.analysis.flops import decode_flops
from dsv4.config import ModelConfig

BACKWARD = 2  # products of the backward per product of the forward: for the input and for the weight
Phase = Literal["dense", "warmup", "sparse"]  # training/attention_phase.py


@dataclass(frozen=True)
class _Forward:
    """FLOPs of a forward on one document: of products with weights that can be frozen; of those whose factors both have
    gradients in any case, attention's on visible pairs and mHC's (whose kernels have no other); and the indexers'."""

    linears: int
    others: int
    index_linears: int
    index_scores: int


def training_flops(
    config: ModelConfig,
    lengths: tuple[int, ...],
    phase: Phase = "sparse",
    mtp: bool = True,
    adapters: Adapters | None = None,
) -> float:
    """FLOPs of forward and backward on documents of these lengths, one micro-batch; of `adapters` if they are trained
    alone."""
    if adapters is not None:
        return sum(adapter_flops(config, lengths, phase, mtp, adapters))
    total = 0
    for length in lengths:
        one = _forward_flops(config, length, phase != "sparse", mtp)
        total += (one.linears + one.others) * (1 if phase == "warmup" else 1 + BACKWARD)
        total += 0 if phase == "dense" else (one.index_linears + one.index_scores) * (1 + BACKWARD)
    return total


def adapter_flops(
    config: ModelConfig, lengths: tuple[int, ...], phase: Phase, mtp: bool, adapters: Adapters, batches: float = 1.0
) -> tuple[float, float]:
    """FLOPs of (forward, backward) on documents in `batches` micro-batches, where adapters alone are trained.

    Products with frozen weights have a gradient for their input alone. The indexers learn only if they have adapters,
    and by a loss of their own, which goes no further.
    """
    forward = backward = 0.0
    for length in lengths:
        one = _forward_flops(config, length, phase != "sparse", mtp)
        forward += one.linears + one.others
        backward += one.linears + BACKWARD * one.others
        if phase != "dense":
            forward += one.index_linears + one.index_scores
            backward += BACKWARD * one.index_scores if adapters.indexer else 0
    sides = sum(lengths), batches, phase != "dense"
    return forward + adapters.forward_flops(*sides), backward + adapters.backward_flops(*sides)


@lru_cache(maxsize=4096)
def _forward_flops(config: ModelConfig, length: int, dense: bool, mtp: bool) -> _Forward:
    """`dense`: tokens read every entry that they see."""
    terms = decode_flops(config, 0).terms
    attention, scores = attention_pairs(config, length, dense)
    index_linears, mixes = length * terms.pop("indexer linears", 0), length * terms.pop("mHC")
    linears, others = length * sum(terms.values()), attention + mixes
    if mtp and config.num_nextn_predict_layers:
        blocks = config.num_nextn_predict_layers
        linears += blocks * length * _mtp_linears(config)
        others += blocks * _core_flops(config) * _seen(length, 1, config.sliding_window)
        others += blocks * mixes // config.num_hidden_layers
    return _Forward(linears, others, index_linears, scores)


def attention_pairs(config: ModelConfig, length: int, dense: bool = False) -> tuple[int, int]:
    """Forward FLOPs of the main layers on pairs of a document's tokens: of attention, of index scores.

    `dense`: tokens read every entry that they see.
    """
    attention = scores = 0
    for layer in range(config.num_hidden_layers):
        kind = config.compression(layer)
        attention += _core_flops(config) * _seen(length, 1, config.sliding_window)
        if kind.ratio:
            limit = config.index_topk if kind.has_indexer and not dense else None
            attention += _core_flops(config) * _seen(length, kind.ratio, limit)
        if kind.has_indexer:
            scores += 2 * config.index_n_heads * config.index_head_dim * _seen(length, kind.ratio, None)
    return attention, scores


def _core_flops(config: ModelConfig) -> int:
    """FLOPs of one key of one token: scores and values."""
    return 4 * config.num_attention_heads * config.head_dim


def _seen(length: int, ratio: int, limit: int | None) -> int:
    """Pairs of a document's tokens and entries of `ratio` tokens that they see, at most `limit` per token."""
    whole = length // ratio  # entries of the last token
    # Tokens e * ratio to (e + 1) * ratio - 1, counted from 1, see e entries.
    if limit is None or whole <= limit:
        return ratio * whole * (whole - 1) // 2 + whole * (length - whole * ratio + 1)
    grown = ratio * limit * (limit - 1) // 2
    return grown + limit * (length - limit * ratio + 1)


def _mtp_linears(config: ModelConfig) -> int:
    """FLOPs per token of an MTP block's products with weights: projections of embedding and streams, a window layer
    without its mHC, the head."""
    terms = decode_flops(config, 0).terms
    layer = sum(terms[name] for name in ("attention linears", "experts", "router")) // config.num_hidden_layers
    return 2 * (1 + config.hc_mult) * config.hidden_size**2 + layer + terms["head"]
