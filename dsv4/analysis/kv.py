"""Bytes of the KV cache: the part that grows with the context, and the fixed state of a sequence. Main layers only.

Source: DeepSeek-V4 report; entry layout as in the public inference engines. The published sizes count the FP8 cache
with the FP4 index.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dsv4.analysis.inventory import FP4_GROUP
from dsv4.config import PAGE_TOKENS, CompressionKind, ModelConfig

KvFormat = Literal["fp8+fp4", "fp8+fp8", "bf16", "fp32"]  # main entries + index keys
KV_FORMATS: tuple[KvFormat, ...] = ("fp8+fp4", "fp8+fp8", "bf16", "fp32")

KV_BLOCK = 64  # channels of one FP8 block scale; the rotary channels stay BF16
SCALE_ALIGN = 8  # an entry's scale bytes are padded to this

# DeepSeek V3.2, 61 layers: latent of 512 FP8 + 4 fp32 scales + 64 BF16, index key of 128 FP8 + one fp32 scale.
V3_2_KV_BYTES_PER_TOKEN = (512 + 4 * 4 + 64 * 2 + 128 + 4) * 61


def entry_bytes(config: ModelConfig, kv_format: KvFormat = "fp8+fp4") -> int:
    """Bytes of one window or compressed entry in one layer (keys and values are the same vector)."""
    if kv_format in ("bf16", "fp32"):
        return (2 if kv_format == "bf16" else 4) * config.head_dim
    plain = config.head_dim - config.qk_rope_head_dim
    scales = -(-plain // KV_BLOCK)
    return plain + 2 * config.qk_rope_head_dim + -(-scales // SCALE_ALIGN) * SCALE_ALIGN


def index_key_bytes(config: ModelConfig, kv_format: KvFormat = "fp8+fp4") -> int:
    """Bytes of one indexer key, shared by the indexer's heads. FP4: one E8M0 scale per group; FP8: one fp32 scale."""
    dim = config.index_head_dim
    fp4 = -(-dim // 2) - (-dim // FP4_GROUP)
    return {"fp8+fp4": fp4, "fp8+fp8": dim + 4, "bf16": 2 * dim, "fp32": 4 * dim}[kv_format]


@dataclass(frozen=True)
class CacheBytes:
    """Bytes of one sequence's cache, by component."""

    entries: int  # compressed entries of CSA and HCA layers
    index_keys: int
    windows: int  # rings of the last `sliding_window` tokens; fixed
    states: int  # open compression windows in fp32; fixed

    @property
    def growing(self) -> int:
        """The part counted in the published bytes per token."""
        return self.entries + self.index_keys

    @property
    def total(self) -> int:
        return self.growing + self.windows + self.states


def state_bytes(config: ModelConfig, kind: CompressionKind) -> int:
    """Bytes of the open compression windows in one layer: kv and score of the tokens still needed, fp32."""
    widths = [config.head_dim] * bool(kind.ratio) + [config.index_head_dim] * kind.has_indexer
    return sum(2 * 4 * kind.state_tokens * kind.channels(width) for width in widths)


def cache_bytes(config: ModelConfig, num_tokens: int, kv_format: KvFormat = "fp8+fp4") -> CacheBytes:
    """Bytes of the cache after `num_tokens` tokens; a compressed entry exists once its window is full."""
    kinds = [config.compression(layer) for layer in range(config.num_hidden_layers)]
    entry, key = entry_bytes(config, kv_format), index_key_bytes(config, kv_format)
    return CacheBytes(
        entries=entry * sum(num_tokens // kind.ratio for kind in kinds if kind.ratio),
        index_keys=key * sum(num_tokens // kind.ratio for kind in kinds if kind.has_indexer),
        windows=entry * config.num_hidden_layers * config.sliding_window,
        states=sum(state_bytes(config, kind) for kind in kinds),
    )


def kv_bytes_per_token(config: ModelConfig, kv_format: KvFormat = "fp8+fp4") -> float:
    """Bytes of growth per context token, exact over whole pages."""
    return cache_bytes(config, PAGE_TOKENS, kv_format).growing / PAGE_TOKENS
