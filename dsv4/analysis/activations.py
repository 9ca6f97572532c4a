"""Bytes that training keeps from a forward to its backward, from a config alone: per token and layer, by policy.

Counted are the tensors that the native kernels save (kernels/*/native.py): kernels that fuse less keep more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from dsv4.config import ModelConfig

# Parts that keep their inputs alone and run again in the backward: training/recompute.py.
Recompute = Literal["none", "attention", "experts", "sublayers", "blocks"]
POLICIES: tuple[Recompute, ...] = get_args(Recompute)

STREAM_BYTES = 4  # per number of the residual streams, in every precision


@dataclass(frozen=True)
class LayerActivations:
    """Numbers per token that one layer keeps, by part; `streams` are those of its first mHC site.

    The backward computes those of the second again, the rotated queries, the experts' gathered inputs and SwiGLU's
    outputs too (model/recomputed.py).
    """

    streams: int
    sites: int  # what mHC keeps besides: outputs of attention and experts, mixes
    attention: int
    experts: int
    width: int  # of a part's input, and of a block's divided by its streams

    def kept(self, policy: Recompute, number_bytes: int) -> int:
        """Bytes per token kept until the backward."""
        if policy == "blocks":
            return self.streams * STREAM_BYTES
        attention = self.width if policy in ("attention", "sublayers") else self.attention
        experts = self.width if policy in ("experts", "sublayers") else self.experts
        return self.streams * STREAM_BYTES + (self.sites + attention + experts) * number_bytes

    def again(self, policy: Recompute, number_bytes: int) -> int:
        """Bytes per token of the largest part while it runs again."""
        if policy == "blocks":
            return self.kept("none", number_bytes) + self.streams * STREAM_BYTES
        parts = {"attention": self.attention, "experts": self.experts}
        parts["sublayers"] = max(parts.values())
        return parts.get(policy, 0) * number_bytes


def layer_activations(config: ModelConfig, layer: int) -> LayerActivations:
    """Activations that layer `layer` keeps; MTP blocks follow the main layers."""
    d, c, ql, heads = config.hidden_size, config.head_dim, config.q_lora_rank, config.num_attention_heads
    kind, k, streams = config.compression(layer), config.num_experts_per_tok, config.hc_mult
    attention = d + 2 * ql + 2 * heads * c + 3 * c + config.o_groups * config.o_lora_rank + config.qk_rope_head_dim
    if kind.ratio:
        attention += 2 * kind.channels(c) + 3 * c // kind.ratio
    if kind.has_indexer:
        index_heads, width = config.index_n_heads, config.index_head_dim
        attention += index_heads * (width + 1) + 2 * kind.channels(width) + 2 * width // kind.ratio
        attention += 2 * config.index_topk  # int64
    mi = config.moe_intermediate_size
    experts = d + k * 2 * mi + 3 * k + 3 * config.n_routed_experts + 2 * mi * config.n_shared_experts
    return LayerActivations(
        streams=streams * d,
        sites=2 * (d + (2 + streams) * streams + streams),
        attention=attention,
        experts=experts,
        width=d,
    )


def head_activations(config: ModelConfig, number_bytes: int) -> tuple[int, int]:
    """(Bytes per token, bytes besides) of the read-out: its streams and input, and the gradient of the head."""
    per_token = config.hc_mult * config.hidden_size * STREAM_BYTES + 2 * config.hidden_size * number_bytes
    return per_token, 4 * config.vocab_size * config.hidden_size
