"""ModelConfig: one DeepSeek V4 model's hyperparameters. Field names are the keys of the official config.json. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class YarnScaling:
    """`rope_scaling` of config.json; it applies to layers with a compressor only, and never scales magnitudes."""

    factor: float = 16.0
    original_max_position_embeddings: int = 65536
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int
    o_groups: int
    index_topk: int
    n_routed_experts: int
    moe_intermediate_size: int
    compress_ratios: tuple[int, ...]  # one per main layer, then one per MTP block
    routed_scaling_factor: float
    num_nextn_predict_layers: int = 1
    num_hash_layers: int = 3
    head_dim: int = 512
    qk_rope_head_dim: int = 64
    o_lora_rank: int = 1024
    sliding_window: int = 128
    index_n_heads: int = 64
    index_head_dim: int = 128
    n_shared_experts: int = 1
    num_experts_per_tok: int = 6
    swiglu_limit: float = 10.0
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    compress_rope_theta: float = 160000.0
    rope_scaling: YarnScaling | None = field(default_factory=YarnScaling)
    max_position_embeddings: int = 1048576
    initializer_range: float = 0.02
    expert_dtype: str = "fp4"  # fp4: official instruct layout; fp8: official Base layout
    bos_token_id: int = 0
    eos_token_id: int = 1
