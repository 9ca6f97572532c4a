"""FLOPs of decoding one token at a context length, 2 per multiply-add, by term and number format.

Source: DeepSeek-V4 report, which gives the ratios to V3.2 but no formula. `eq_fp8` weighs a format by its cost on the
tensor cores (FP8 1, BF16 and FP32 2, FP4 with FP4 one half), which reproduces the published ratios. Experts multiply
FP8 activations by FP4 weights: 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dsv4.config import ModelConfig

FORMAT_WEIGHT = {"fp8": 1.0, "bf16": 2.0, "fp4": 0.5}


@dataclass
class DecodeFlops:
    terms: dict[str, int] = field(default_factory=dict[str, int])
    by_format: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FORMAT_WEIGHT, 0))

    def add(self, term: str, number_format: str, flops: int) -> None:
        self.terms[term] = self.terms.get(term, 0) + flops
        self.by_format[number_format] += flops

    @property
    def raw(self) -> int:
        return sum(self.by_format.values())

    @property
    def eq_fp8(self) -> float:
        return sum(FORMAT_WEIGHT[name] * flops for name, flops in self.by_format.items())


def decode_flops(config: ModelConfig, context: int) -> DecodeFlops:
    """FLOPs of one token in the main model with `context` tokens visible, itself included."""
    d, c, ql, heads = config.hidden_size, config.head_dim, config.q_lora_rank, config.num_attention_heads
    wo_a = heads * c * config.o_lora_rank
    linears = d * ql + ql * heads * c + d * c + wo_a + config.o_groups * config.o_lora_rank * d
    experts = config.num_experts_per_tok + config.n_shared_experts
    mixes = (2 + config.hc_mult) * config.hc_mult
    window = min(context, config.sliding_window)
    core = 4 * heads * c  # scores and values of one key
    out = DecodeFlops()
    for layer in range(config.num_hidden_layers):
        kind = config.compression(layer)
        entries = context // kind.ratio if kind.ratio else 0
        out.add("attention linears", "fp8", 2 * linears)
        out.add("experts", "fp8", 2 * experts * 3 * d * config.moe_intermediate_size)
        out.add("router", "bf16", 2 * config.n_routed_experts * d)
        out.add("mHC", "bf16", 2 * 2 * mixes * (config.hc_mult * d + d))
        out.add("attention core", "bf16", core * window)
        if kind.ratio:
            out.add("compressors", "bf16", 2 * 2 * d * kind.channels(c))
            out.add("attention core", "bf16", core * (min(config.index_topk, entries) if kind.has_indexer else entries))
        if kind.has_indexer:
            ih, ic = config.index_n_heads, config.index_head_dim
            out.add("indexer linears", "bf16", 2 * 2 * d * kind.channels(ic) + 2 * d * ih)
            out.add("indexer linears", "fp8", 2 * ql * ih * ic)
            out.add("index scores", "fp4", 2 * ih * ic * entries)
    out.add("head", "bf16", 2 * config.vocab_size * d)
    return out


def v3_2_decode_flops(context: int) -> DecodeFlops:
    """FLOPs of DeepSeek V3.2, the report's baseline: 61 MLA layers with a 2048-key indexer, 58 MoE and 3 dense MLPs."""
    d, layers, heads = 7168, 61, 128
    out = DecodeFlops()
    linears = d * 1536 + 1536 * heads * 192 + d * 576 + 512 * heads * 256 + heads * 128 * d
    out.add("attention linears", "fp8", layers * 2 * linears)
    out.add("experts", "fp8", 58 * 2 * 9 * 3 * d * 2048 + 3 * 2 * 3 * d * 18432)
    out.add("router", "bf16", 58 * 2 * 256 * d)
    out.add("indexer linears", "fp8", layers * 2 * (1536 * 8192 + d * 128))
    out.add("indexer linears", "bf16", layers * 2 * d * 64)
    out.add("index scores", "fp8", layers * 2 * 64 * 128 * context)
    out.add("attention core", "bf16", layers * 2 * heads * (576 + 512) * min(2048, context))
    out.add("head", "bf16", 2 * 129280 * d)
    return out
