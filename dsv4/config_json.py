"""config.json <-> the fields of ModelConfig, in the official spelling and in the one that transformers 5 writes.

transformers folds several official keys: `compress_ratios` becomes `layer_types` with `compress_rates` (the MTP entry
falls off), `num_hash_layers` becomes `mlp_layer_types`, `rope_scaling` becomes `rope_parameters`, and `expert_dtype`
moves into `quantization_config`. Either spelling is read; where both stand they must agree.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from dsv4.config import ModelConfig

# Keys whose value is a field of ModelConfig as it stands.
_FIELD_KEYS = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_nextn_predict_layers", "num_hash_layers"),
    *("num_attention_heads", "head_dim", "qk_rope_head_dim", "q_lora_rank", "o_groups", "o_lora_rank"),
    *("sliding_window", "index_n_heads", "index_head_dim", "index_topk"),
    *("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size"),
    *("routed_scaling_factor", "swiglu_limit", "hc_mult", "hc_sinkhorn_iters", "hc_eps", "rms_norm_eps"),
    *("rope_theta", "compress_rope_theta", "max_position_embeddings", "initializer_range", "expert_dtype"),
    *("bos_token_id", "eos_token_id"),
)
# Keys that name a variant of the mathematics: one value is V4's, any other would be silently wrong.
_FIXED_KEYS: dict[str, Any] = {
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
_ARCHITECTURE = "DeepseekV4ForCausalLM"
# Keys that say how the weights are stored, read apart from the fields.
_FOLDED_KEYS = (
    *("architectures", "compress_ratios", "layer_types", "compress_rates", "mlp_layer_types"),
    *("rope_scaling", "rope_parameters", "partial_rotary_factor", "quantization_config"),
)
# Keys without influence on the mathematics.
_IGNORED_KEYS = (
    *("transformers_version", "torch_dtype", "dtype", "use_cache", "pad_token_id", "_name_or_path", "name_or_path"),
    *("output_router_logits", "router_aux_loss_coef", "router_jitter_noise", "auto_map", "_attn_implementation"),
    *("output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward", "is_encoder_decoder"),
    *("id2label", "label2id", "problem_type"),
)
_KNOWN_KEYS = (*_FIELD_KEYS, *_FIXED_KEYS, *_FOLDED_KEYS, *_IGNORED_KEYS)
# A key (part) that gives away another model or file.
_LOOK_ALIKES = {
    "dspark": "a DSpark checkpoint (*-DSpark, Flash-0731, Pro-0813), whose three-stage drafter is not V4's MTP block",
    "engram": "V4.1, another model with engram layers",
    "vision_": "a vision model (Flash-Vision-Exp), which has more than V4's text layers",
    "bias_vl": "a vision model (Flash-Vision-Exp), which has more than V4's text layers",
    "first_k_dense_replace": "a DeepSeek V2 or V3 model: V4 has no dense layers",
    "kv_lora_rank": "a DeepSeek V2 or V3 model: V4 has no up-projected latent attention",
    "moe_inter_dim": "the inference demo's config.json; use the one beside the published weights",
}

_LAYER_TYPE_RATIOS = {"sliding_attention": 0, "compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
_QUANTIZATION: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "scale_fmt": "ue8m0",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
_QUANTIZATION_IGNORED = ("modules_to_not_convert", "modules_to_convert", "dequantize")
_YARN_KEYS = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow")


def fields_from_json(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of ModelConfig (`rope_scaling` as a dict or None). Raises ValueError naming key and value."""
    _check_keys(raw)
    for key, expected in _FIXED_KEYS.items():
        if key in raw and not _same(raw[key], expected):
            raise ValueError(f"{key} = {raw[key]!r} is not supported; allowed: {expected!r}")
    architectures = raw.get("architectures")
    if architectures is not None and architectures != [_ARCHITECTURE]:
        raise ValueError(f"architectures = {architectures!r} is not supported; allowed: {[_ARCHITECTURE]!r}")
    values: dict[str, Any] = {key: raw[key] for key in _FIELD_KEYS if key in raw}
    _take(values, "expert_dtype", _expert_dtype(raw.get("quantization_config")), "quantization_config.expert_dtype")
    if isinstance(values.get("eos_token_id"), list) and len(values["eos_token_id"]) == 1:
        values["eos_token_id"] = values["eos_token_id"][0]
    _read_rope(raw, values)
    _read_schedule(raw, values)
    return values


def config_to_json(config: ModelConfig, quantized: bool) -> dict[str, Any]:
    """The official config.json. Without `quantized`, no `expert_dtype` and no `quantization_config`."""
    scaling = config.rope_scaling
    out: dict[str, Any] = {
        "architectures": [_ARCHITECTURE],
        **{key: _FIXED_KEYS[key] for key in ("attention_bias", "attention_dropout", "hidden_act", "model_type")},
        **{key: _FIXED_KEYS[key] for key in ("norm_topk_prob", "num_key_value_heads", "scoring_func", "topk_method")},
        "tie_word_embeddings": False,
        **{key: getattr(config, key) for key in _FIELD_KEYS},
        "compress_ratios": list(config.compress_ratios),
        "rope_scaling": None if scaling is None else {"type": "yarn", **{k: getattr(scaling, k) for k in _YARN_KEYS}},
        "quantization_config": dict(_QUANTIZATION),
        "torch_dtype": "bfloat16",
        "transformers_version": "4.57.1",
        "use_cache": True,
    }
    if not quantized:
        del out["expert_dtype"], out["quantization_config"]
    return dict(sorted(out.items()))


def _same(found: object, expected: object) -> bool:
    """Equal as JSON values: 1 is not True, but 0 is 0.0."""
    return found == expected and isinstance(found, bool) == isinstance(expected, bool)


def _check_keys(raw: Mapping[str, Any]) -> None:
    for key in raw:
        for part, model in _LOOK_ALIKES.items():
            if part in key:
                raise ValueError(
                    f"{key} = {raw[key]!r}: this is {model}; supported: DeepSeek V4 Flash and Pro and shapes like them"
                )
    for key in raw:
        if key not in _KNOWN_KEYS:
            near = difflib.get_close_matches(key, _KNOWN_KEYS, n=1, cutoff=0.0)
            raise ValueError(f"unknown key {key!r} (value {raw[key]!r}); the nearest known key is {near[0]!r}")


def _take(values: dict[str, Any], key: str, found: Any, place: str) -> None:
    """Set `key` from its folded spelling (None: not given); where the plain spelling stands too they must agree."""
    if found is None:
        return
    if key in values and not _same(values[key], found):
        raise ValueError(
            f"{key} = {values[key]!r} contradicts {place}, which says {found!r}; allowed: one of them, or equal"
        )
    values[key] = found


def _mapping(value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{key} = {value!r} is not supported; allowed: a JSON object")
    return cast("dict[str, Any]", value)


def _sequence(value: Any, key: str, length: int | None = None) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)) or (length is not None and len(cast("list[Any]", value)) != length):
        allowed = "a list" if length is None else f"a list of num_hidden_layers = {length} entries"
        raise ValueError(f"{key} = {value!r} is not supported; allowed: {allowed}")
    return cast("list[Any]", value)


def _expert_dtype(quantization: Any) -> Any:
    """Check `quantization_config` (absent or null: plain weights) and return the `expert_dtype` inside it, if any."""
    if quantization is None:
        return None
    given = _mapping(quantization, "quantization_config")
    for key, value in given.items():
        place = f"quantization_config.{key}"
        if key in _QUANTIZATION:
            # transformers writes scale_fmt "float" for F32 scales; readers go by the stored dtype.
            allowed = (_QUANTIZATION[key], "float") if key == "scale_fmt" else (_QUANTIZATION[key],)
            if (list(cast("list[Any]", value)) if isinstance(value, tuple) else value) not in allowed:
                raise ValueError(f"{place} = {value!r} is not supported; allowed: {' or '.join(map(repr, allowed))}")
        elif key != "expert_dtype" and key not in _QUANTIZATION_IGNORED:
            known = (*_QUANTIZATION, "expert_dtype", *_QUANTIZATION_IGNORED)
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            raise ValueError(f"unknown key {place!r} (value {value!r}); the nearest known key is {near[0]!r}")
    return given.get("expert_dtype")


def _read_rope(raw: Mapping[str, Any], values: dict[str, Any]) -> None:
    """rope_scaling, or rope_parameters = {main, compress}; and qk_rope_head_dim from partial_rotary_factor."""
    scaling = (
        None
        if raw.get("rope_scaling") is None
        else _yarn(_mapping(raw["rope_scaling"], "rope_scaling"), "rope_scaling")
    )
    if raw.get("rope_parameters") is not None:
        given = _mapping(raw["rope_parameters"], "rope_parameters")
        if set(given) != {"main", "compress"}:
            raise ValueError(f"rope_parameters has keys {sorted(given)}; allowed: exactly 'compress' and 'main'")
        for name, theta_key in (("main", "rope_theta"), ("compress", "compress_rope_theta")):
            place = f"rope_parameters.{name}"
            table = _mapping(given[name], place)
            _take(values, theta_key, table.get("rope_theta"), f"{place}.rope_theta")
            _take_rotary(values, table.get("partial_rotary_factor"), place)
            yarn = _yarn(table, place)
            if name == "main" and yarn is not None:
                raise ValueError(
                    f"{place}.rope_type = 'yarn' is not supported; allowed: 'default' (YaRN is for 'compress')"
                )
            if name == "compress":
                if "rope_scaling" in raw and scaling != yarn:
                    raise ValueError(
                        f"rope_scaling = {raw['rope_scaling']!r} contradicts {place} = {table!r}; allowed: equal"
                    )
                scaling = yarn
    _take_rotary(values, raw.get("partial_rotary_factor"), "config")
    values["rope_scaling"] = scaling


def _take_rotary(values: dict[str, Any], factor: Any, place: str) -> None:
    if factor is None:
        return
    if type(factor) not in (int, float) or type(values.get("head_dim", 512)) is not int:
        raise ValueError(
            f"{place}: partial_rotary_factor = {factor!r} is not supported; allowed: qk_rope_head_dim / head_dim"
        )
    _take(
        values,
        "qk_rope_head_dim",
        round(values.get("head_dim", 512) * factor),
        f"{place}: partial_rotary_factor {factor!r}",
    )


def _yarn(table: dict[str, Any], place: str) -> dict[str, Any] | None:
    """The YarnScaling arguments of one rope table, or None when it says plain RoPE."""
    kind = table.get("rope_type", table.get("type", "default"))
    if kind not in ("yarn", "default") or table.get("type", kind) != kind:
        raise ValueError(
            f"{place}: type {kind!r} (rope_type and type alike) is not supported; allowed: 'yarn' or 'default'"
        )
    if table.get("attention_factor", 1.0) != 1.0:
        raise ValueError(f"{place}.attention_factor = {table['attention_factor']!r} is not supported; allowed: 1.0")
    for key in table:
        if key not in (*_YARN_KEYS, "type", "rope_type", "attention_factor", "rope_theta", "partial_rotary_factor"):
            raise ValueError(
                f"unknown key '{place}.{key}' (value {table[key]!r}); allowed: {', '.join(('type', *_YARN_KEYS))}"
            )
    if kind == "default":
        return None
    for key in ("factor", "original_max_position_embeddings"):
        if key not in table:
            raise ValueError(f"{place}.{key} is missing; YaRN needs it")
    return {key: table[key] for key in _YARN_KEYS if key in table}


def _read_schedule(raw: Mapping[str, Any], values: dict[str, Any]) -> None:
    """compress_ratios and num_hash_layers, from their own keys or from layer_types and mlp_layer_types."""
    layers = values.get("num_hidden_layers")
    if "compress_ratios" in raw:
        values["compress_ratios"] = tuple(_sequence(raw["compress_ratios"], "compress_ratios"))
    rates = raw.get("compress_rates")
    expected = {name: ratio for name, ratio in _LAYER_TYPE_RATIOS.items() if ratio}
    if rates is not None and rates != expected:
        raise ValueError(f"compress_rates = {rates!r} is not supported; allowed: {expected!r}")
    if raw.get("layer_types") is not None:
        types = _sequence(raw["layer_types"], "layer_types", layers)
        for index, name in enumerate(types):
            if not isinstance(name, str) or name not in _LAYER_TYPE_RATIOS:
                raise ValueError(
                    f"layer_types[{index}] = {name!r} is not supported; allowed: {', '.join(_LAYER_TYPE_RATIOS)}"
                )
        ratios = tuple(_LAYER_TYPE_RATIOS[name] for name in types)
        if "compress_ratios" in values and values["compress_ratios"][: len(ratios)] != ratios:
            raise ValueError(
                f"compress_ratios = {raw['compress_ratios']!r} contradicts layer_types = {types!r}; allowed: equal"
            )
        # transformers drops the MTP block's entry; it is always window only.
        drafts = values.get("num_nextn_predict_layers", 1)
        values.setdefault("compress_ratios", ratios + (0,) * (drafts if type(drafts) is int else 0))
    if raw.get("mlp_layer_types") is not None:
        types = list(_sequence(raw["mlp_layer_types"], "mlp_layer_types", layers))
        hashed = types.count("hash_moe")
        if types != ["hash_moe"] * hashed + ["moe"] * (len(types) - hashed):
            raise ValueError(
                f"mlp_layer_types = {types!r} is not supported; allowed: 'hash_moe' entries, then 'moe' entries"
            )
        _take(values, "num_hash_layers", hashed, "mlp_layer_types")
