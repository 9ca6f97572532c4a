"""Names of tensors and hyperparameters in llama.cpp's architecture `deepseek4` (as of llama-cpp-python 0.3.36)."""

from __future__ import annotations

from typing import Any

from dsv4.config import ModelConfig

ARCHITECTURE = "deepseek4"
PROJECTIONS = {"w1": "gate", "w2": "down", "w3": "up"}
# llama.cpp rotates index keys by Hadamard matrices of 64 or more: heads of another width are padded with zeros.
INDEX_HEAD_MULTIPLE = 64

_MODEL_NAMES = {
    "embed.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "head.weight": "output.weight",
    "hc_head_fn": "output_hc_fn.weight",
    "hc_head_base": "output_hc_base.weight",
    "hc_head_scale": "output_hc_scale.weight",
}
_LAYER_NAMES = {
    **{f"hc_{site}_{part}": f"hc_{site}_{part}.weight" for site in ("attn", "ffn") for part in ("fn", "base", "scale")},
    "attn_norm.weight": "attn_norm.weight",
    "ffn_norm.weight": "ffn_norm.weight",
    "attn.attn_sink": "attn_sinks.weight",
    "attn.wq_a.weight": "attn_q_a.weight",
    "attn.q_norm.weight": "attn_q_a_norm.weight",
    "attn.wq_b.weight": "attn_q_b.weight",
    "attn.wkv.weight": "attn_kv.weight",
    "attn.kv_norm.weight": "attn_kv_a_norm.weight",
    "attn.wo_a.weight": "attn_output_a.weight",
    "attn.wo_b.weight": "attn_output_b.weight",
    "attn.compressor.wkv.weight": "attn_compressor_kv.weight",
    "attn.compressor.wgate.weight": "attn_compressor_gate.weight",
    "attn.compressor.ape": "attn_compressor_ape.weight",
    "attn.compressor.norm.weight": "attn_compressor_norm.weight",
    "attn.indexer.wq_b.weight": "indexer.attn_q_b.weight",
    "attn.indexer.weights_proj.weight": "indexer.proj.weight",
    "attn.indexer.compressor.wkv.weight": "indexer_compressor_kv.weight",
    "attn.indexer.compressor.wgate.weight": "indexer_compressor_gate.weight",
    "attn.indexer.compressor.ape": "indexer_compressor_ape.weight",
    "attn.indexer.compressor.norm.weight": "indexer_compressor_norm.weight",
    "ffn.gate.weight": "ffn_gate_inp.weight",
    "ffn.gate.bias": "exp_probs_b.bias",
    "ffn.gate.tid2eid": "ffn_gate_tid2eid.weight",
    **{f"ffn.shared_experts.{w}.weight": f"ffn_{kind}_shexp.weight" for w, kind in PROJECTIONS.items()},
}
_DRAFT_NAMES = {
    "e_proj.weight": "nextn.eh_proj.weight",
    "h_proj.weight": "nextn.eh_proj.weight",
    "enorm.weight": "nextn.enorm.weight",
    "hnorm.weight": "nextn.hnorm.weight",
    "norm.weight": "nextn.shared_head_norm.weight",
}


def to_gguf(name: str, config: ModelConfig) -> str:
    """llama.cpp's name of an official tensor. A layer's experts share three names, MTP's e_proj and h_proj share one.

    The MTP block is the layer after the last; its hc_head has the name of the model's, in a separate file.
    """
    if name in _MODEL_NAMES:
        return _MODEL_NAMES[name]
    stack, number, rest = name.split(".", 2)
    if stack == "mtp" and rest.startswith("hc_head_"):
        return _MODEL_NAMES[rest]
    layer = int(number) + (config.num_hidden_layers if stack == "mtp" else 0)
    if rest.startswith("ffn.experts."):
        return f"blk.{layer}.ffn_{PROJECTIONS[rest.split('.')[3]]}_exps.weight"
    names = _LAYER_NAMES | _DRAFT_NAMES if stack == "mtp" else _LAYER_NAMES
    return f"blk.{layer}.{names[rest]}"


def index_head_dim(config: ModelConfig) -> int:
    """Width of an index head in the file."""
    return -(-config.index_head_dim // INDEX_HEAD_MULTIPLE) * INDEX_HEAD_MULTIPLE


def metadata(config: ModelConfig, mtp: bool) -> dict[str, Any]:
    """Hyperparameters by key, without the architecture prefix; Python's type gives the stored one (u32, f32, bool)."""
    blocks = config.num_hidden_layers + (config.num_nextn_predict_layers if mtp else 0)
    values: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "block_count": blocks,
        "embedding_length": config.hidden_size,
        "embedding_length_out": config.hidden_size * config.hc_mult,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": 1,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.q_lora_rank": config.q_lora_rank,
        "attention.sliding_window": config.sliding_window,
        "attention.indexer.head_count": config.index_n_heads,
        "attention.indexer.key_length": index_head_dim(config),
        "attention.indexer.top_k": config.index_topk,
        "attention.output_group_count": config.o_groups,
        "attention.output_lora_rank": config.o_lora_rank,
        "attention.compress_ratios": list(config.compress_ratios),
        "attention.compress_rope_freq_base": float(config.compress_rope_theta),
        "rope.dimension_count": config.qk_rope_head_dim,
        "rope.freq_base": float(config.rope_theta),
        "expert_count": config.n_routed_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_shared_count": config.n_shared_experts,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_gating_func": 4,  # sqrt(softplus)
        "expert_weights_scale": float(config.routed_scaling_factor),
        "expert_weights_norm": True,
        "swiglu_clamp_exp": [float(config.swiglu_limit)] * blocks,
        "swiglu_clamp_shexp": [float(config.swiglu_limit)] * blocks,
        "hyper_connection.count": config.hc_mult,
        "hyper_connection.sinkhorn_iterations": config.hc_sinkhorn_iters,
        "hyper_connection.epsilon": float(config.hc_eps),
        "hash_layer_count": config.num_hash_layers,
        "rope.scaling.type": "none" if config.rope_scaling is None else "yarn",
    }
    if config.rope_scaling is not None:
        values |= {
            "rope.scaling.factor": float(config.rope_scaling.factor),
            "rope.scaling.original_context_length": config.rope_scaling.original_max_position_embeddings,
            "rope.scaling.yarn_beta_fast": float(config.rope_scaling.beta_fast),
            "rope.scaling.yarn_beta_slow": float(config.rope_scaling.beta_slow),
        }
    if mtp:
        values["nextn_predict_layers"] = config.num_nextn_predict_layers
    return values
