"""ModelConfig: hyperparameters of one DeepSeek V4 model, named as the keys of the official config.json. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, cast

from dsv4.config_json import config_to_json, fields_from_json, has_draft_model
from dsv4.hub import fetch_settings, hub_name
from dsv4.notices import warn_once
from dsv4.presets import PRESETS

LayerKind = Literal["swa", "csa", "hca"]


@dataclass(frozen=True)
class CompressionKind:
    """Compression in layers of one ratio: their view of the context before the window. As in native/base/views.h."""

    name: LayerKind
    ratio: int  # tokens per compressed entry; 0: no entries
    overlap: bool = False  # an entry also covers the previous entry's tokens, through separate channels
    has_indexer: bool = False  # a token reads only the entries that the indexer selects

    @property
    def state_tokens(self) -> int:
        """Number of last tokens whose projections the next entries may need."""
        return self.ratio * (2 if self.overlap else 1)

    def channels(self, width: int) -> int:
        """Projected channels per token, for entries of `width` channels."""
        return width * (2 if self.overlap else 1)


SWA = CompressionKind("swa", 0)
CSA = CompressionKind("csa", 4, overlap=True, has_indexer=True)
HCA = CompressionKind("hca", 128)
COMPRESSION_KINDS = {kind.ratio: kind for kind in (SWA, CSA, HCA)}

WINDOW = 128  # tokens of the sliding window in every published model, the only one that the kernels implement
PAGE_TOKENS = 128  # tokens per cache page: whole windows of every compression ratio
EXPERT_DTYPES = ("fp4", "fp8")


@dataclass(frozen=True)
class YarnScaling:
    """`rope_scaling` of config.json; it applies to layers with a compressor only, and never scales magnitudes."""

    factor: float = 16.0
    original_max_position_embeddings: int = 65536
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    """Hyperparameters of one model. On construction, ValueError names a key whose value V4 does not allow."""

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
    sliding_window: int = WINDOW
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
    eos_token_id: int | tuple[int, ...] = 1  # several: generation ends at any of them

    def __post_init__(self) -> None:
        object.__setattr__(self, "compress_ratios", tuple(self.compress_ratios))
        if isinstance(self.eos_token_id, list):  # pyright: ignore[reportUnnecessaryIsInstance]
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        _check_numbers(self)
        _check_schedule(self)
        _check_widths(self)
        _check_tokens(self)

    @classmethod
    def preset(cls, name: str) -> ModelConfig:
        """A published shape (flash, pro, flash-base, pro-base) or the embedded model's (nano)."""
        if name not in PRESETS:
            raise ValueError(f"preset {name!r} is unknown; allowed: {', '.join(PRESETS)}")
        values = dict(PRESETS[name])
        if "rope_scaling" in values:
            values["rope_scaling"] = YarnScaling(**values["rope_scaling"])
        return cls(**values)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], place: str | Path = "config.json") -> ModelConfig:
        """Read the content of a config.json, official or as transformers writes it.

        Keys that do not affect the computation are ignored; one warning that begins with `place` lists them. ValueError
        on an unsupported key or value that would change the computation, or on a contradiction. Without `rope_scaling`
        there is no YaRN. A draft model of several blocks (DSpark's) is left out: `num_nextn_predict_layers` is then 0.
        """
        values, ignored = fields_from_json(raw)
        scaling = cast("dict[str, Any] | None", values.pop("rope_scaling"))
        missing = [f.name for f in fields(cls) if f.name not in values and f.name in _REQUIRED]
        if missing:
            raise ValueError(f"missing {'key' if len(missing) == 1 else 'keys'}: {', '.join(missing)}")
        config = cls(**values, rope_scaling=None if scaling is None else YarnScaling(**scaling))
        draft = "a draft model of several blocks, which is left out" if has_draft_model(raw) else ""
        keys = f"ignored keys: {', '.join(ignored)}" if ignored else ""
        if draft or keys:
            warn_once(f"{place}: {'; '.join(filter(None, (draft, keys)))}")
        return config

    @classmethod
    def from_pretrained(cls, path: str | Path, revision: str | None = None) -> ModelConfig:
        """Read config.json in a model folder, or the file itself, of "nano" or owner/name. Errors name the file."""
        file = settings_folder(path, revision)
        if file.is_dir():
            file /= "config.json"
        if not file.is_file():
            raise FileNotFoundError(
                f"no config.json at {file}; expected a model folder, a config.json file or owner/name"
            )
        try:
            raw: object = json.loads(file.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{file}: not valid JSON: {error}") from error
        if not isinstance(raw, dict):
            raise ValueError(f"{file}: expected a JSON object, found {type(raw).__name__}")
        try:
            return cls.from_dict(cast("dict[str, Any]", raw), file)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error

    def to_dict(self, quantized: bool = True) -> dict[str, Any]:
        """Every key of the official config.json. `quantized=False` (a BF16 or FP32 folder) leaves out the formats."""
        return config_to_json(self, quantized)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every token at which generation ends."""
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    def layer_ratio(self, layer: int) -> int:
        """Tokens per compressed entry of main layer `layer` (MTP blocks follow the main layers); 0: window only."""
        if not 0 <= layer < len(self.compress_ratios):
            raise IndexError(f"layer {layer} is out of range; allowed: 0 to {len(self.compress_ratios) - 1}")
        return self.compress_ratios[layer]

    def compression(self, layer: int) -> CompressionKind:
        """Compression kind of a layer; MTP blocks follow the main layers."""
        return COMPRESSION_KINDS[self.layer_ratio(layer)]

    def layer_kind(self, layer: int) -> LayerKind:
        return self.compression(layer).name

    @property
    def has_indexer(self) -> bool:
        """True if a layer has an indexer."""
        return any(COMPRESSION_KINDS[ratio].has_indexer for ratio in self.compress_ratios)

    def is_hash_routed(self, layer: int) -> bool:
        """True if the layer picks experts by token id (`gate.tid2eid`), False if by score plus bias."""
        return layer < self.num_hash_layers

    def layers_of_kind(self, kind: LayerKind) -> list[int]:
        """Main layers only, ascending."""
        return [layer for layer in range(self.num_hidden_layers) if self.layer_kind(layer) == kind]


def settings_folder(model: str | Path, revision: str | None = None) -> Path:
    """Folder with the settings and tokenizer of a model folder, "nano", or owner/name, whose weights stay away."""
    name = hub_name(model, revision)
    if name is not None:
        return fetch_settings(name)
    return nano_path() if model == "nano" and not Path(model).exists() else Path(model)


def nano_path() -> Path:
    """Folder of the embedded nano model: `_models/nano` in an installed package, `models/nano` in a checkout."""
    package = Path(__file__).resolve().parent
    candidates = (package / "_models" / "nano", package.parent / "models" / "nano")
    for folder in candidates:
        if (folder / "config.json").is_file():
            return folder
    raise FileNotFoundError(f"the embedded nano model is missing; looked in {' and '.join(map(str, candidates))}")


_REQUIRED = {
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "q_lora_rank",
    "o_groups",
    "index_topk",
    "n_routed_experts",
    "moe_intermediate_size",
    "compress_ratios",
    "routed_scaling_factor",
}
_MAY_BE_ZERO = {"num_nextn_predict_layers", "num_hash_layers", "bos_token_id"}
_ONE_SHARED_EXPERT = (
    "1: V4 has one shared expert, the published code takes no other number and transformers makes one whatever it says"
)


def _reject(key: str, value: object, allowed: str) -> ValueError:
    return ValueError(f"{key} = {value!r} is not allowed; allowed: {allowed}")


def _check_numbers(config: ModelConfig) -> None:
    scaling = config.rope_scaling
    if scaling is not None and not isinstance(scaling, YarnScaling):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise _reject("rope_scaling", scaling, "a YarnScaling, or None for no YaRN")
    for owner, prefix in ((config, ""), (scaling, "rope_scaling.")):
        for item in fields(owner) if owner is not None else ():
            key, value = prefix + item.name, getattr(owner, item.name)
            if item.type == "int":
                lowest = 0 if item.name in _MAY_BE_ZERO else 1
                if type(value) is not int or value < lowest:
                    raise _reject(key, value, f"an integer of at least {lowest}")
            elif item.type == "float" and (type(value) not in (int, float) or not 0 < value < math.inf):
                raise _reject(key, value, "a finite number above 0")
    if config.expert_dtype not in EXPERT_DTYPES:
        raise _reject("expert_dtype", config.expert_dtype, " or ".join(map(repr, EXPERT_DTYPES)))


def _check_schedule(config: ModelConfig) -> None:
    layers, drafts = config.num_hidden_layers, config.num_nextn_predict_layers
    if drafts > 1:
        raise _reject("num_nextn_predict_layers", drafts, "0 or 1, as V4 has one MTP block")
    if len(config.compress_ratios) != layers + drafts:
        raise _reject(
            "compress_ratios",
            list(config.compress_ratios),
            f"num_hidden_layers + num_nextn_predict_layers = {layers} + {drafts} entries, "
            f"found {len(config.compress_ratios)}",
        )
    for index, ratio in enumerate(config.compress_ratios):
        if type(ratio) is not int or ratio not in COMPRESSION_KINDS:
            hint = " (ratios 1 and 2 belong to V4.1, another model)" if ratio in (1, 2) else ""
            raise _reject(f"compress_ratios[{index}]", ratio, f"0, 4 or 128{hint}")
    if any(config.compress_ratios[layers:]):
        raise _reject(
            f"compress_ratios[{layers}]", config.compress_ratios[layers], "0, as the MTP block has no compressor"
        )
    if config.num_hash_layers > layers:
        raise _reject("num_hash_layers", config.num_hash_layers, f"0 to num_hidden_layers = {layers}")


def _check_widths(config: ModelConfig) -> None:
    if config.num_attention_heads % config.o_groups:
        raise _reject("o_groups", config.o_groups, f"a divisor of num_attention_heads = {config.num_attention_heads}")
    if config.num_experts_per_tok > config.n_routed_experts:
        raise _reject(
            "num_experts_per_tok", config.num_experts_per_tok, f"1 to n_routed_experts = {config.n_routed_experts}"
        )
    rope = config.qk_rope_head_dim
    if rope % 2:
        raise _reject("qk_rope_head_dim", rope, "an even number: channels rotate in pairs")
    if rope > config.head_dim:
        raise _reject("qk_rope_head_dim", rope, f"up to head_dim = {config.head_dim}")
    if config.has_indexer and rope > config.index_head_dim:
        raise _reject("qk_rope_head_dim", rope, f"up to index_head_dim = {config.index_head_dim}")
    if config.n_shared_experts != 1:
        raise _reject("n_shared_experts", config.n_shared_experts, _ONE_SHARED_EXPERT)


def _check_tokens(config: ModelConfig) -> None:
    last = config.vocab_size - 1
    for key, ids in (("bos_token_id", (config.bos_token_id,)), ("eos_token_id", config.eos_token_ids)):
        if not ids or any(type(token) is not int or not 0 <= token <= last for token in ids):
            several = ", or a list of such numbers" if key == "eos_token_id" else ""
            raise _reject(key, getattr(config, key), f"0 to vocab_size - 1 = {last}{several}")
