"""Named model shapes: the four published checkpoints and the embedded nano model. Plain data."""

from __future__ import annotations

from typing import Any

_FLASH: dict[str, Any] = {
    "vocab_size": 129280,
    "hidden_size": 4096,
    "num_hidden_layers": 43,
    "num_attention_heads": 64,
    "q_lora_rank": 1024,
    "o_groups": 8,
    "index_topk": 512,
    "n_routed_experts": 256,
    "moe_intermediate_size": 2048,
    "compress_ratios": (0, 0, *(4, 128) * 20, 4, 0),
    "routed_scaling_factor": 1.5,
}

_PRO: dict[str, Any] = {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "o_groups": 16,
    "index_topk": 1024,
    "n_routed_experts": 384,
    "moe_intermediate_size": 3072,
    "compress_ratios": (128, 128, *(4, 128) * 29, 4, 0),
    "routed_scaling_factor": 2.5,
}

_NANO: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_hash_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 64,
    "qk_rope_head_dim": 32,
    "q_lora_rank": 128,
    "o_groups": 2,
    "o_lora_rank": 64,
    "index_n_heads": 4,
    "index_head_dim": 32,
    "index_topk": 128,
    "n_routed_experts": 30,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "compress_ratios": (0, 0, 4, 128, 4, 128, 0),
    "routed_scaling_factor": 1.5,
    # Most of its training has 4,096 tokens; V4's 65,536 would leave the angles of longer texts to chance.
    "rope_scaling": {"factor": 32.0, "original_max_position_embeddings": 4096},
}

# Keyword arguments of ModelConfig; fields that a preset leaves out have their default, the same in Flash and Pro.
PRESETS: dict[str, dict[str, Any]] = {
    "flash": _FLASH,
    "pro": _PRO,
    "flash-base": {**_FLASH, "expert_dtype": "fp8"},
    "pro-base": {**_PRO, "expert_dtype": "fp8"},
    "nano": _NANO,
}
