"""FLOPs of training on documents, 2 per multiply-add: those of the model, without recomputation and the optimizer."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

from dsv4.analysis.flops import decode_flops
from dsv4.config import ModelConfig

BACKWARD = 2  # products of the backward per product of the forward: for the input and for the weight
Phase = Literal["dense", "warmup", "sparse"]  # training/attention_phase.py


def training_flops(config: ModelConfig, lengths: tuple[int, ...], phase: Phase = "sparse", mtp: bool = True) -> int:
    """FLOPs of forward and backward on documents of these lengths."""
    total = 0
    for length in lengths:
        backbone, indexer = _forward_flops(config, length, phase != "sparse", mtp)
        total += backbone * (1 if phase == "warmup" else 1 + BACKWARD)
        total += 0 if phase == "dense" else indexer * (1 + BACKWARD)
    return total


@lru_cache(maxsize=4096)
def _forward_flops(config: ModelConfig, length: int, dense: bool, mtp: bool) -> tuple[int, int]:
    """FLOPs of a forward on one document, without the indexers and of them; of attention those on visible pairs.

    `dense`: tokens read every entry that they see.
    """
    terms = decode_flops(config, 0).terms
    attention, scores = attention_pairs(config, length, dense)
    indexer = length * terms.pop("indexer linears", 0) + scores
    backbone = length * sum(terms.values()) + attention
    if mtp and config.num_nextn_predict_layers:
        core = _core_flops(config) * _seen(length, 1, config.sliding_window)
        backbone += config.num_nextn_predict_layers * (length * _mtp_flops(config, config.hidden_size) + core)
    return backbone, indexer


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


def _mtp_flops(config: ModelConfig, d: int) -> int:
    """FLOPs per token of an MTP block outside its attention core: two projections, a window layer, the head."""
    terms = decode_flops(config, 0).terms
    layer = sum(terms[name] for name in ("attention linears", "experts", "router", "mHC")) // config.num_hidden_layers
    return 2 * 2 * d * d + layer + terms["head"]
