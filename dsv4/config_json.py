"""config.json <-> the fields of ModelConfig, in the official spelling and in the one that transformers 5 writes.

transformers folds several official keys: `compress_ratios` becomes `layer_types` with `compress_rates` (the MTP entry
falls off), `num_hash_layers` becomes `mlp_layer_types`, `rope_scaling` becomes `rope_parameters`, and `expert_dtype`
moves into `quantization_config`. Either spelling is read; if both are present they must agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from dsv4.config_keys import (
    DRAFT_PART,
    FIELD_KEYS,
    FIXED_KEYS,
    NEUTRAL_QUANTIZATION_KEYS,
    NEUTRAL_ROPE_KEYS,
    check_keys,
    check_neutral,
    same,
    unused,
)

if TYPE_CHECKING:
    from dsv4.config import ModelConfig

_ARCHITECTURE = "DeepseekV4ForCausalLM"
_LAYER_TYPE_RATIOS = {"sliding_attention": 0, "compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
_QUANTIZATION: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "scale_fmt": "ue8m0",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
_QUANTIZATION_USED = (*_QUANTIZATION, "expert_dtype", "modules_to_not_convert", "modules_to_convert", "dequantize")
_YARN_KEYS = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
_ROPE_USED = (*_YARN_KEYS, "type", "rope_type", "attention_factor", "rope_theta", "partial_rotary_factor")


def fields_from_json(raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(keyword arguments of ModelConfig, with `rope_scaling` as a dict or None; ignored keys, with their places).

    Raises ValueError naming key and value.
    """
    ignored = check_keys(raw)
    architectures = raw.get("architectures")
    if architectures is not None and architectures != [_ARCHITECTURE]:
        raise ValueError(f"architectures = {architectures!r} is not supported; allowed: {[_ARCHITECTURE]!r}")
    values: dict[str, Any] = {key: raw[key] for key in FIELD_KEYS if key in raw}
    _take(values, "n_routed_experts", raw.get("num_local_experts"), "num_local_experts")
    _take(values, "expert_dtype", _expert_dtype(raw, ignored), "quantization_config.expert_dtype")
    if isinstance(values.get("eos_token_id"), list):
        values["eos_token_id"] = tuple(values["eos_token_id"])
    if has_draft_model(raw):
        values["num_nextn_predict_layers"] = 0
    _read_rope(raw, values, ignored)
    _read_schedule(raw, values)
    return values, ignored


def has_draft_model(raw: Mapping[str, Any]) -> bool:
    """True if config.json describes a draft model of several blocks (DSpark's) in place of V4's MTP block."""
    blocks = raw.get("num_nextn_predict_layers")
    return any(DRAFT_PART in key for key in raw) or (type(blocks) is int and blocks > 1)


def config_to_json(config: ModelConfig, quantized: bool) -> dict[str, Any]:
    """The official config.json. Without `quantized`, no `expert_dtype` and no `quantization_config`."""
    scaling = config.rope_scaling
    out: dict[str, Any] = {
        "architectures": [_ARCHITECTURE],
        **{key: FIXED_KEYS[key] for key in ("attention_bias", "attention_dropout", "hidden_act", "model_type")},
        **{key: FIXED_KEYS[key] for key in ("norm_topk_prob", "num_key_value_heads", "scoring_func", "topk_method")},
        "tie_word_embeddings": False,
        **{key: getattr(config, key) for key in FIELD_KEYS},
        "eos_token_id": _as_json(config.eos_token_id),
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


def _as_json(value: Any) -> Any:
    return list(cast("tuple[Any, ...]", value)) if isinstance(value, tuple) else value


def _take(values: dict[str, Any], key: str, found: Any, place: str) -> None:
    """Set `key` from its folded spelling (None: not given), which must agree with the plain spelling if both exist."""
    if found is None:
        return
    if key in values and not same(values[key], found):
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


def _expert_dtype(raw: Mapping[str, Any], ignored: list[str]) -> Any:
    """Check `quantization_config` (absent or null: plain weights) and return the `expert_dtype` inside it, if any."""
    if raw.get("quantization_config") is None:
        return None
    given = _mapping(raw["quantization_config"], "quantization_config")
    for key, expected in _QUANTIZATION.items():
        value = _as_json(given.get(key))
        # transformers writes scale_fmt "float" for F32 scales; the reader goes by the stored dtype.
        allowed = (expected, "float") if key == "scale_fmt" else (expected,)
        if value is not None and value not in allowed:
            place = f"quantization_config.{key}"
            raise ValueError(f"{place} = {value!r} is not supported; allowed: {' or '.join(map(repr, allowed))}")
    check_neutral(given, NEUTRAL_QUANTIZATION_KEYS, "quantization_config.")
    ignored += unused(given, _QUANTIZATION_USED, "quantization_config")
    return given.get("expert_dtype")


def _read_rope(raw: Mapping[str, Any], values: dict[str, Any], ignored: list[str]) -> None:
    """Read rope_scaling, or rope_parameters = {main, compress}, and qk_rope_head_dim from partial_rotary_factor."""
    scaling = (
        None
        if raw.get("rope_scaling") is None
        else _yarn(_mapping(raw["rope_scaling"], "rope_scaling"), "rope_scaling", ignored)
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
            yarn = _yarn(table, place, ignored)
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


def _yarn(table: dict[str, Any], place: str, ignored: list[str]) -> dict[str, Any] | None:
    """The YarnScaling arguments of one rope table, or None for plain RoPE."""
    kind = table.get("rope_type", table.get("type", "default"))
    if kind not in ("yarn", "default") or table.get("type", kind) != kind:
        raise ValueError(
            f"{place}: type {kind!r} (rope_type and type alike) is not supported; allowed: 'yarn' or 'default'"
        )
    check_neutral(table, NEUTRAL_ROPE_KEYS, f"{place}.")
    ignored += unused(table, _ROPE_USED, place)
    if kind == "default":
        return None
    for key in ("factor", "original_max_position_embeddings"):
        if key not in table:
            raise ValueError(f"{place}.{key} is missing; YaRN needs it")
    return {key: table[key] for key in _YARN_KEYS if key in table}


def _read_schedule(raw: Mapping[str, Any], values: dict[str, Any]) -> None:
    """Read compress_ratios and num_hash_layers, from their own keys or from layer_types and mlp_layer_types."""
    layers = values.get("num_hidden_layers")
    if "compress_ratios" in raw:
        values["compress_ratios"] = _without_absent_layers(
            tuple(_sequence(raw["compress_ratios"], "compress_ratios")),
            layers,
            values.get("num_nextn_predict_layers", 1),
        )
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


def _without_absent_layers(ratios: tuple[Any, ...], layers: Any, drafts: Any) -> tuple[Any, ...]:
    """Entries of the main layers and MTP blocks that exist; a model stripped of some keeps a longer list."""
    if type(layers) is not int or type(drafts) is not int or len(ratios) <= layers + drafts:
        return ratios
    return ratios[:layers] + (0,) * drafts  # an MTP block is always window only
