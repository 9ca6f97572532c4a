"""Report of `dsv4 inspect`, as one JSON-ready object."""

from __future__ import annotations

from typing import Any

from dsv4.analysis.flops import decode_flops, v3_2_decode_flops
from dsv4.analysis.inventory import StorageLayout, default_layout, tensor_inventory
from dsv4.analysis.kv import KV_FORMATS, V3_2_KV_BYTES_PER_TOKEN, cache_bytes, kv_bytes_per_token
from dsv4.analysis.parameters import count_parameters
from dsv4.config import ModelConfig

KV_CONTEXTS = (4096, 131072, 1048576)
FLOPS_CONTEXTS = (4096, 131072, 1048576)
MILLION = 1048576


def summary(config: ModelConfig, layout: StorageLayout | None = None) -> dict[str, Any]:
    """Counts, bytes and FLOPs of one config. `layout` defaults to the official one for the config's `expert_dtype`.

    `kv_bytes` and `kv_bytes_per_token` count compressed entries and index keys only, FP8 cache with FP4 index;
    `decode_flops` are plain FLOPs, `decode_flops_eq_fp8` weighs formats like the published ratios.
    """
    chosen = layout or default_layout(config)
    tensors: dict[str, int] = {}
    num_bytes: dict[str, int] = {}
    scale_bytes = 0
    for spec in tensor_inventory(config, chosen):
        tensors[spec.dtype] = tensors.get(spec.dtype, 0) + 1
        num_bytes[spec.dtype] = num_bytes.get(spec.dtype, 0) + spec.num_bytes
        scale_bytes += spec.num_bytes if spec.component == "scale" else 0
    count = count_parameters(config)
    fixed = cache_bytes(config, 0)
    flops = {str(context): decode_flops(config, context) for context in FLOPS_CONTEXTS}
    at_million = decode_flops(config, MILLION)
    return {
        "layers": {kind: len(config.layers_of_kind(kind)) for kind in ("swa", "csa", "hca")},
        "parameters": {
            "total": count.total,
            "total_with_mtp": count.total_with_mtp,
            "active": count.active,
            "active_with_embed": count.active_with_embed,
            "mtp_active": count.mtp_active,
            "main": count.main,
            "mtp": count.mtp,
            "router_bias": count.router_bias,
            "tid2eid": count.tid2eid,
        },
        "checkpoint": {
            "layout": chosen,
            "tensors": sum(tensors.values()),
            "bytes": sum(num_bytes.values()),
            "by_dtype": tensors,
            "bytes_by_dtype": num_bytes,
            "scale_bytes": scale_bytes,
        },
        "kv_bytes_per_token": kv_bytes_per_token(config),
        "kv_bytes_per_token_by_format": {name: kv_bytes_per_token(config, name) for name in KV_FORMATS},
        "kv_bytes": {str(context): cache_bytes(config, context).growing for context in KV_CONTEXTS},
        "state_bytes": {"windows": fixed.windows, "open_windows": fixed.states},
        "decode_flops": {context: value.raw for context, value in flops.items()},
        "decode_flops_eq_fp8": {context: value.eq_fp8 for context, value in flops.items()},
        "decode_flops_terms_1m": at_million.terms,
        "vs_v3_2": {
            "kv_ratio_1m": cache_bytes(config, MILLION).growing / (V3_2_KV_BYTES_PER_TOKEN * MILLION),
            "flops_ratio_1m": at_million.eq_fp8 / v3_2_decode_flops(MILLION).eq_fp8,
        },
    }
