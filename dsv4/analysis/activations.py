"""Bytes of activations in training, from a config alone: per token and layer, by policy. Those kept from the forward
to the backward, and those that a layer's backward needs besides.

Counted are the tensors that the native kernels save (kernels/*/native.py): kernels that fuse less keep more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from dsv4.analysis.adapters import Adapters
from dsv4.analysis.training_flops import Phase
from dsv4.config import ModelConfig

# Parts that keep their inputs alone and run again in the backward: training/recompute.py.
Recompute = Literal["none", "attention", "experts", "sublayers", "blocks"]
POLICIES: tuple[Recompute, ...] = get_args(Recompute)

EXPERTS = ("experts", "shared_experts")
STREAM_BYTES = 4  # per number of the residual streams, in every precision


@dataclass(frozen=True)
class LayerActivations:
    """Numbers per token of one layer, by part; `streams` are those of its first mHC site.

    Kept are streams, sites, attention, experts and, of an MTP block, `fused`. `queries` and `gathered` are made of them
    in the backward (model/recomputed.py); a part that runs again keeps its own. `lists` are bytes.
    """

    streams: int
    sites: int  # what mHC keeps besides: outputs of attention and experts, mixes
    attention: int
    experts: int
    width: int  # of a part's input, and of a block's divided by its streams
    fused: int = 0  # kept outside of the block by every policy: normed embedding and streams before their projections
    queries: int = 0  # rotated
    gathered: int = 0  # rows for the experts, SwiGLU's outputs
    attention_gradients: int = 0
    expert_gradients: int = 0
    lists: int = 0  # bytes of the entries that tokens read, while attention runs
    indexer: int | None = None  # what is kept of a layer if its indexer alone learns, 0 without one; None: all learns

    def kept(self, policy: Recompute, number_bytes: int) -> int:
        """Bytes per token kept until the backward."""
        if self.indexer is not None:
            return self.streams * STREAM_BYTES if policy == "blocks" and self.indexer else self.indexer * number_bytes
        if policy == "blocks":
            return self.streams * STREAM_BYTES + self.fused * number_bytes
        attention = self.width if policy in ("attention", "sublayers") else self.attention
        experts = self.width if policy in ("experts", "sublayers") else self.experts
        return self.streams * STREAM_BYTES + (self.sites + attention + experts + self.fused) * number_bytes

    def working(self, policy: Recompute, number_bytes: int) -> int:
        """Bytes per token that its backward needs besides, where they are most: what it runs again, and gradients.

        The experts' comes first, with the streams between the sub-layers and the gradient of the streams; then mHC's,
        which adds two gradients of them; then attention's. Where the indexer alone learns, the forward is the most.
        """
        block = policy == "blocks"
        attention = self.queries + (self.attention if block or policy in ("attention", "sublayers") else 0)
        experts = self.gathered + (self.experts if block or policy in ("experts", "sublayers") else 0)
        sites = self.sites if block else 0
        waiting = sites + attention if block else 0  # run again with the experts, needed after them
        stream = self.streams * STREAM_BYTES
        if self.indexer is not None:
            # As many queries and outputs as there would be gradients of them. Of experts rows, outputs, and outputs by
            # token; inputs, the shared expert and the sum. Beside an MTP block's streams the main model's wait.
            attended = number_bytes * self.attention_gradients + self.lists
            routed = number_bytes * (self.expert_gradients + 3 * self.width)
            return (3 if self.fused else 2) * stream + max(attended, routed)
        return max(
            2 * stream + number_bytes * (waiting + experts + self.expert_gradients),
            4 * stream + number_bytes * (waiting + self.width),
            stream + number_bytes * (sites + attention + self.attention_gradients) + self.lists,
        )


def layer_activations(
    config: ModelConfig,
    layer: int,
    phase: Phase = "sparse",
    sequence: int | None = None,
    adapters: Adapters | None = None,
) -> LayerActivations:
    """Activations of layer `layer` on documents of `sequence` tokens; MTP blocks follow the main layers.

    sequence: None where all tokens read as many entries as the indexer chooses. adapters: are trained alone, so that
    only they keep the inputs of their matrices.
    """
    d, c, ql, heads = config.hidden_size, config.head_dim, config.q_lora_rank, config.num_attention_heads
    kind, k, streams = config.compression(layer), config.num_experts_per_tok, config.hc_mult
    attention = d + 2 * ql + 2 * heads * c + 3 * c + config.o_groups * config.o_lora_rank + config.qk_rope_head_dim
    lists = indexer = 0
    if kind.ratio:
        attention += 2 * kind.channels(c) + 3 * c // kind.ratio
    if kind.has_indexer:
        if phase != "dense":
            index_heads, width = config.index_n_heads, config.index_head_dim
            indexer = index_heads * (width + 1) + 2 * kind.channels(width) + 2 * width // kind.ratio
            attention += indexer if adapters is None or adapters.indexer else 0
            indexer += d + ql  # its inputs; of its scores the gradients, as large as its queries and their weights
        if phase == "sparse":
            attention += 2 * config.index_topk  # int64
        lists = _list_bytes(config.index_topk, phase, None if sequence is None else sequence // kind.ratio)
    mi = config.moe_intermediate_size
    experts = d + k * 2 * mi + 3 * k + 3 * config.n_routed_experts + 2 * mi * config.n_shared_experts
    fused = (streams + 2) * d if layer >= config.num_hidden_layers else 0
    if adapters is not None:
        part = f"layers.{layer}" if not fused else f"mtp.{layer - config.num_hidden_layers}"
        attention += adapters.kept(part, "attn.") - _unkept_inputs(config, adapters, part)
        experts += adapters.kept(part, "ffn.")
        experts -= 0 if adapters.has(part, *(f"ffn.{kind}.{w}" for kind in EXPERTS for w in ("w1", "w3"))) else d
        fused = d * adapters.has(part, "e_proj") + streams * d * adapters.has(part, "h_proj")
        fused += adapters.kept(part, "e_proj") + adapters.kept(part, "h_proj")
    return LayerActivations(
        streams=streams * d,
        sites=2 * (d + (2 + streams) * streams + streams),
        attention=attention,
        experts=experts,
        width=d,
        fused=fused,
        queries=heads * c,
        gathered=k * (d + mi) + config.n_shared_experts * mi,
        attention_gradients=d + 4 * heads * c,  # of outputs, rotated and not, and of queries; scaled queries
        expert_gradients=d + k * (3 * d + mi),  # of the output; of an expert's input by both products and their sum
        lists=lists,
        indexer=indexer if phase == "warmup" else None,
    )


def _unkept_inputs(config: ModelConfig, adapters: Adapters, part: str) -> int:
    """Numbers per token of attention that are inputs of frozen matrices alone; wo_a never has an adapter."""
    of_block = ("wq_a", "wkv", "compressor.wkv", "compressor.wgate", "indexer.weights_proj", "indexer.compressor.wkv",
                "indexer.compressor.wgate")  # fmt: skip
    inputs = {
        of_block: config.hidden_size,
        ("wq_b", "indexer.wq_b"): config.q_lora_rank,
        ("wo_b",): config.o_groups * config.o_lora_rank,
    }
    unkept = (n for names, n in inputs.items() if not adapters.has(part, *(f"attn.{name}" for name in names)))
    return config.num_attention_heads * config.head_dim + sum(unkept)


def _list_bytes(top_k: int, phase: Phase, entries: int | None) -> int:
    """Bytes per token of a list of entries that tokens read, beside the indexer's choice.

    Chosen ones the kernels copy to int32. Where every token reads all of its entries there is no list, but for the
    indexer that learns them their probabilities, as wide as the longest.
    """
    if phase == "sparse" and (entries is None or entries > top_k):
        return 4 * top_k
    return 4 * (entries or top_k) if phase == "warmup" else 0


def received_rows(config: ModelConfig, layer: int, sequence: int) -> int:
    """Numbers of all entries and index keys of a document, which the last rank of a context dimension gets its part of.

    parallel/context.py sends them; the 127 rows at a cut are left out.
    """
    kind = config.compression(layer)
    if not kind.ratio:
        return 0
    return sequence // kind.ratio * (config.head_dim + (config.index_head_dim if kind.has_indexer else 0))


def head_activations(config: ModelConfig, number_bytes: int) -> tuple[int, int]:
    """(Bytes per token, bytes besides) of the read-out: its streams and input, and the gradient of the head."""
    per_token = config.hc_mult * config.hidden_size * STREAM_BYTES + 2 * config.hidden_size * number_bytes
    return per_token, 4 * config.vocab_size * config.hidden_size
