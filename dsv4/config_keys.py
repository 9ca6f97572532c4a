"""The keys of config.json: those used here, those of features that V4 lacks, and the rest, which is ignored.

An unknown key is ignored and named. Three kinds of keys are refused, because ignoring them would compute another
function than the file describes: a feature that V4 lacks with a value that switches it on, a key of another model, and
a misspelling of a key that is missing.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

# Keys whose value becomes a field of ModelConfig unchanged.
FIELD_KEYS = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_nextn_predict_layers", "num_hash_layers"),
    *("num_attention_heads", "head_dim", "qk_rope_head_dim", "q_lora_rank", "o_groups", "o_lora_rank"),
    *("sliding_window", "index_n_heads", "index_head_dim", "index_topk"),
    *("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size"),
    *("routed_scaling_factor", "swiglu_limit", "hc_mult", "hc_sinkhorn_iters", "hc_eps", "rms_norm_eps"),
    *("rope_theta", "compress_rope_theta", "max_position_embeddings", "initializer_range", "expert_dtype"),
    *("bos_token_id", "eos_token_id"),
)
# Keys that select a variant of the mathematics: one value is V4's, any other would be silently wrong.
FIXED_KEYS: dict[str, Any] = {
    "model_type": "deepseek_v4",
    "num_key_value_heads": 1,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "compress_rate_csa": 4,
    "compress_rate_hca": 128,
}
# Keys with a reader of their own in config_json.py.
FOLDED_KEYS = (
    *("architectures", "compress_ratios", "layer_types", "compress_rates", "mlp_layer_types"),
    *("rope_scaling", "rope_parameters", "partial_rotary_factor", "quantization_config", "num_local_experts"),
)
# Keys of features that V4 lacks -> the value that switches the feature off (as do None and an absent key).
NEUTRAL_KEYS: dict[str, Any] = {
    **dict.fromkeys(("use_bias", "qkv_bias", "use_qkv_bias", "o_bias", "lm_head_bias", "add_bias_linear"), False),
    **dict.fromkeys(("add_cross_attention", "is_encoder_decoder", "tie_encoder_decoder"), False),
    **dict.fromkeys(("rope_interleave", "use_sliding_window", "use_qk_norm", "qk_norm"), True),
    **dict.fromkeys(("final_logit_softcapping", "attn_logit_softcapping", "logit_softcap", "router_logit_softcap"), 0),
    **dict.fromkeys(("logit_scale", "logits_scaling", "embedding_multiplier", "residual_multiplier", "scale_emb"), 1),
    **dict.fromkeys(("hidden_dropout", "hidden_dropout_prob", "resid_pdrop", "embd_pdrop", "dropout"), 0),
    **dict.fromkeys(("first_k_dense_replace", "kv_lora_rank", "attention_chunk_size", "sparse_attention_config"), 0),
    "moe_layer_freq": 1,
    "swiglu_alpha": 1,
}
# The same for keys inside quantization_config and inside a table of rope_scaling or rope_parameters.
NEUTRAL_QUANTIZATION_KEYS: dict[str, Any] = {"bits": 8, "zero_point": False, "desc_act": False, "config_groups": {}}
NEUTRAL_ROPE_KEYS: dict[str, Any] = {
    "attention_factor": 1.0,
    **dict.fromkeys(("mscale", "mscale_all_dim"), 0),
    **dict.fromkeys(("low_freq_factor", "high_freq_factor", "short_factor", "long_factor", "alpha"), 0),
    "truncate": True,
    "rope_interleave": True,
}
# Keys that do not affect the computation and are too common to be worth a warning.
SILENT_KEYS = (
    *("transformers_version", "torch_dtype", "dtype", "use_cache", "pad_token_id", "_name_or_path", "name_or_path"),
    *("output_router_logits", "router_aux_loss_coef", "router_jitter_noise", "auto_map", "_attn_implementation"),
    *("output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward"),
    *("id2label", "label2id", "problem_type"),
)
_KNOWN_KEYS = (*FIELD_KEYS, *FIXED_KEYS, *FOLDED_KEYS, *NEUTRAL_KEYS, *SILENT_KEYS)
# The drafter of *-DSpark, Flash-0731 and Pro-0813: extra blocks and heads, which the main model does not need.
DRAFT_PART = "dspark"
# Parts of keys that identify another model or kind of file.
_LOOK_ALIKES = {
    "engram": "V4.1, another model with engram layers",
    "kv_source_layer": "V4.1, another model, whose layers share caches",
    "index_source_layer": "V4.1, another model, whose layers share indexes",
    "vision_": "a vision model (Flash-Vision-Exp), which has more than V4's text layers",
    "bias_vl": "a vision model (Flash-Vision-Exp), which has more than V4's text layers",
    "first_k_dense_replace": "a DeepSeek V2 or V3 model: V4 has no dense layers",
    "kv_lora_rank": "a DeepSeek V2 or V3 model: V4 has no up-projected latent attention",
    "moe_inter_dim": "the inference demo's config.json; use the one beside the published weights",
}
_MISSPELT = 0.85  # similarity from which an unknown key counts as a misspelling of a missing one


def same(found: object, expected: object) -> bool:
    """True if equal as JSON values: 1 differs from True, but 0 equals 0.0."""
    return found == expected and isinstance(found, bool) == isinstance(expected, bool)


def check_keys(raw: Mapping[str, Any]) -> list[str]:
    """Ignored keys of config.json, without the common ones. ValueError on a key that must not be ignored."""
    for key, value in raw.items():
        for part, model in _LOOK_ALIKES.items():
            if part in key and not _is_off(value, NEUTRAL_KEYS.get(key)):
                raise ValueError(
                    f"{key} = {value!r}: this is {model}; supported: DeepSeek V4 Flash and Pro and shapes like them"
                )
    for key, expected in FIXED_KEYS.items():
        if raw.get(key) is not None and not same(raw[key], expected):
            raise ValueError(f"{key} = {raw[key]!r} is not supported; allowed: {expected!r}")
    check_neutral(raw, NEUTRAL_KEYS)
    _check_widths_of_latent_heads(raw)
    ignored = [key for key in raw if key not in _KNOWN_KEYS]
    for key in ignored:
        missing = [other for other in (*FIELD_KEYS, *FOLDED_KEYS) if other not in raw]
        near = [] if DRAFT_PART in key else difflib.get_close_matches(key, missing, n=1, cutoff=_MISSPELT)
        if near and key not in _LATENT_WIDTHS:
            raise ValueError(f"unknown key {key!r} (value {raw[key]!r}); allowed: {near[0]!r}, which is missing")
    return ignored


def check_neutral(table: Mapping[str, Any], neutral: Mapping[str, Any], place: str = "") -> None:
    """ValueError if a feature that V4 lacks is switched on; `place` is the prefix of the key in the message."""
    for key, expected in neutral.items():
        if key in table and not _is_off(table[key], expected):
            raise ValueError(f"{place}{key} = {table[key]!r} is not supported; allowed: {expected!r}, or no such key")


def unused(table: Mapping[str, Any], used: tuple[str, ...], place: str) -> Iterator[str]:
    """Keys of a table inside config.json that are not in `used`, prefixed with `place`."""
    return (f"{place}.{key}" for key in table if key not in used)


def _is_off(value: object, expected: object) -> bool:
    return value is None or same(value, expected)


# Keys of V3's head widths, whose values follow from V4's.
_LATENT_WIDTHS = ("v_head_dim", "qk_head_dim", "qk_nope_head_dim")


def _check_widths_of_latent_heads(raw: Mapping[str, Any]) -> None:
    head, rope = raw.get("head_dim", 512), raw.get("qk_rope_head_dim", 64)
    for key, of_rope in zip(_LATENT_WIDTHS, (0, 0, 1), strict=True):
        if raw.get(key) is None or type(head) is not int or type(rope) is not int:
            continue
        width = head - of_rope * rope
        if raw[key] != width:
            raise ValueError(f"{key} = {raw[key]!r} is not supported; allowed: {width}, which follows from head_dim")
