"""Analysis of a config alone: parameters, tensors and bytes, KV cache, decode FLOPs. No torch, no weights."""

from dsv4.analysis.flops import DecodeFlops, decode_flops
from dsv4.analysis.inventory import StorageLayout, TensorSpec, checkpoint_bytes, default_layout, tensor_inventory
from dsv4.analysis.kv import KV_FORMATS, cache_bytes, kv_bytes_per_token
from dsv4.analysis.parameters import ParameterCount, count_parameters
from dsv4.analysis.report import summary

__all__ = [
    "KV_FORMATS",
    "DecodeFlops",
    "ParameterCount",
    "StorageLayout",
    "TensorSpec",
    "cache_bytes",
    "checkpoint_bytes",
    "count_parameters",
    "decode_flops",
    "default_layout",
    "kv_bytes_per_token",
    "summary",
    "tensor_inventory",
]
