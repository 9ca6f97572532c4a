"""Every tensor of a checkpoint, from the config alone: name, shape and dtype as stored, and its component.

Source: the published checkpoints' listings. The published Flash-Base holds two more tensors than listed here, copies of
the embedding and the head under `mtp.0`.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Literal, NamedTuple

from dsv4.config import ModelConfig

StorageLayout = Literal["official", "official-base", "bf16", "fp32"]
LAYOUTS: tuple[StorageLayout, ...] = ("official", "official-base", "bf16", "fp32")

# Bytes per element, by the dtype names of safetensors. I8 holds two FP4 values.
DTYPE_BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "F8_E8M0": 1, "I64": 8, "I8": 1}

FP8_BLOCK = 128  # rows and columns of one FP8 weight scale
FP4_GROUP = 32  # columns of one FP4 weight scale


class TensorSpec(NamedTuple):
    name: str
    shape: tuple[int, ...]  # as stored
    dtype: str
    component: str  # one of parameters.COMPONENTS, or "scale", "router_bias", "tid2eid"
    parameters: int  # logical elements; 0 for scales and other non-parameters

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


class _Weight(NamedTuple):
    """A tensor independent of layout. kind: its storage in the official layout."""

    name: str
    shape: tuple[int, ...]
    kind: Literal["fp8", "expert", "bf16", "f32", "i64"]
    component: str


def default_layout(config: ModelConfig) -> StorageLayout:
    """Official layout for the config's `expert_dtype`: FP4 experts with E8M0 scales, or Base's FP8 with F32 scales."""
    return "official" if config.expert_dtype == "fp4" else "official-base"


def tensor_inventory(config: ModelConfig, layout: StorageLayout | None = None) -> Iterator[TensorSpec]:
    """Tensors in checkpoint order: embedding, layers, MTP, head. `layout` defaults to the config's own."""
    chosen = layout or default_layout(config)
    if chosen not in LAYOUTS:
        raise ValueError(f"layout {chosen!r} is unknown; allowed: {', '.join(LAYOUTS)}")
    for weight in _weights(config):
        yield from _stored(weight, chosen)


def checkpoint_bytes(config: ModelConfig, layout: StorageLayout | None = None) -> int:
    """Sum of tensor bytes, `metadata.total_size` of the index file."""
    return sum(spec.num_bytes for spec in tensor_inventory(config, layout))


def _stored(weight: _Weight, layout: StorageLayout) -> Iterator[TensorSpec]:
    name, shape, kind, component = weight
    size = 0 if component in ("router_bias", "tid2eid") else prod(shape)
    if kind in ("f32", "i64"):
        yield TensorSpec(name, shape, "F32" if kind == "f32" else "I64", component, size)
    elif layout == "fp32":
        yield TensorSpec(name, shape, "F32", component, size)
    elif kind == "bf16" or layout == "bf16":
        yield TensorSpec(name, shape, "BF16", component, size)
    else:
        rows, columns = shape
        scale = name.removesuffix("weight") + "scale"
        if kind == "expert" and layout == "official":
            yield TensorSpec(name, (rows, -(-columns // 2)), "I8", component, size)
            yield TensorSpec(scale, (rows, -(-columns // FP4_GROUP)), "F8_E8M0", "scale", 0)
        else:
            grid = (-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))
            yield TensorSpec(name, shape, "F8_E4M3", component, size)
            yield TensorSpec(scale, grid, "F8_E8M0" if layout == "official" else "F32", "scale", 0)


def _weights(config: ModelConfig) -> Iterator[_Weight]:
    d = config.hidden_size
    yield _Weight("embed.weight", (config.vocab_size, d), "bf16", "embed")
    for layer in range(config.num_hidden_layers):
        yield from _block(config, layer, f"layers.{layer}.")
    for draft in range(config.num_nextn_predict_layers):
        prefix = f"mtp.{draft}."
        yield from _block(config, config.num_hidden_layers + draft, prefix)
        for name in ("e_proj", "h_proj"):
            yield _Weight(f"{prefix}{name}.weight", (d, d), "fp8", "mtp_projections")
        for name in ("enorm", "hnorm", "norm"):
            yield _Weight(f"{prefix}{name}.weight", (d,), "bf16", "norms")
        yield from _hyper_connection_head(config, prefix)
    yield _Weight("norm.weight", (d,), "bf16", "norms")
    yield from _hyper_connection_head(config, "")
    yield _Weight("head.weight", (config.vocab_size, d), "bf16", "head")


def _hyper_connection_head(config: ModelConfig, prefix: str) -> Iterator[_Weight]:
    hc = config.hc_mult
    for name, shape in (("fn", (hc, hc * config.hidden_size)), ("base", (hc,)), ("scale", (1,))):
        yield _Weight(f"{prefix}hc_head_{name}", shape, "f32", "mhc")


def _block(config: ModelConfig, layer: int, prefix: str) -> Iterator[_Weight]:
    hc, d = config.hc_mult, config.hidden_size
    mixes = (2 + hc) * hc  # pre, post, and the hc x hc combination
    for site in ("attn", "ffn"):
        for name, shape in (("fn", (mixes, hc * d)), ("base", (mixes,)), ("scale", (3,))):
            yield _Weight(f"{prefix}hc_{site}_{name}", shape, "f32", "mhc")
        yield _Weight(f"{prefix}{site}_norm.weight", (d,), "bf16", "norms")
    yield from _attention(config, layer, f"{prefix}attn.")
    yield from _moe(config, layer, f"{prefix}ffn.")


def _attention(config: ModelConfig, layer: int, prefix: str) -> Iterator[_Weight]:
    d, c, ql = config.hidden_size, config.head_dim, config.q_lora_rank
    heads, groups, ol = config.num_attention_heads, config.o_groups, config.o_lora_rank
    yield _Weight(f"{prefix}attn_sink", (heads,), "f32", "attention")
    yield _Weight(f"{prefix}wq_a.weight", (ql, d), "fp8", "attention")
    yield _Weight(f"{prefix}q_norm.weight", (ql,), "bf16", "norms")
    yield _Weight(f"{prefix}wq_b.weight", (heads * c, ql), "fp8", "attention")
    yield _Weight(f"{prefix}wkv.weight", (c, d), "fp8", "attention")
    yield _Weight(f"{prefix}kv_norm.weight", (c,), "bf16", "norms")
    yield _Weight(f"{prefix}wo_a.weight", (groups * ol, heads // groups * c), "fp8", "attention")
    yield _Weight(f"{prefix}wo_b.weight", (d, groups * ol), "fp8", "attention")
    kind = config.compression(layer)
    if kind.ratio:
        yield from _compressor(config, layer, c, f"{prefix}compressor.", "compressors")
    if kind.has_indexer:
        ih, ic = config.index_n_heads, config.index_head_dim
        yield _Weight(f"{prefix}indexer.wq_b.weight", (ih * ic, ql), "fp8", "indexers")
        yield _Weight(f"{prefix}indexer.weights_proj.weight", (ih, d), "bf16", "indexers")
        yield from _compressor(config, layer, ic, f"{prefix}indexer.compressor.", "indexers")


def _compressor(config: ModelConfig, layer: int, dim: int, prefix: str, component: str) -> Iterator[_Weight]:
    kind = config.compression(layer)
    width = kind.channels(dim)
    yield _Weight(f"{prefix}ape", (kind.ratio, width), "f32", component)
    yield _Weight(f"{prefix}wkv.weight", (width, config.hidden_size), "bf16", component)
    yield _Weight(f"{prefix}wgate.weight", (width, config.hidden_size), "bf16", component)
    yield _Weight(f"{prefix}norm.weight", (dim,), "bf16", "norms")


def _moe(config: ModelConfig, layer: int, prefix: str) -> Iterator[_Weight]:
    d, mi, experts = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
    yield _Weight(f"{prefix}gate.weight", (experts, d), "bf16", "router")
    if config.is_hash_routed(layer):
        yield _Weight(f"{prefix}gate.tid2eid", (config.vocab_size, config.num_experts_per_tok), "i64", "tid2eid")
    else:
        yield _Weight(f"{prefix}gate.bias", (experts,), "f32", "router_bias")
    for expert in range(experts):
        for name, shape in (("w1", (mi, d)), ("w2", (d, mi)), ("w3", (mi, d))):
            yield _Weight(f"{prefix}experts.{expert}.{name}.weight", shape, "expert", "routed_experts")
    shared = mi * config.n_shared_experts
    for name, shape in (("w1", (shared, d)), ("w2", (d, shared)), ("w3", (shared, d))):
        yield _Weight(f"{prefix}shared_experts.{name}.weight", shape, "fp8", "shared_experts")
