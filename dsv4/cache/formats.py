"""Formats of the rows that a cache stores: window keys, entries and index keys.

In float numerics a row is its channels in fp32 or BF16. In shipped numerics it is stored as the published model stores
it, without loss: what is written has been rounded to the format before (kernels/quant).
- Keys and entries: one E4M3 code per channel that is not rotated, the rotated channels in BF16, then one E8M0 scale per
  KV_BLOCK codes, padded to SCALE_ALIGN bytes. 584 bytes for 512 channels, 64 of them rotated.
- Index keys: E2M1 codes, two per byte, the even channel in the low half, then one E8M0 scale per FP4_GROUP codes. 68
  bytes for 128 channels.
The last block of codes may be shorter. A block with a value that is not finite has the scale NaN and codes of 0; no
code is NaN itself. `native/base/stored_rows.h` reads and writes the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from dsv4.analysis.inventory import FP4_GROUP
from dsv4.analysis.kv import KV_BLOCK, entry_bytes, index_key_bytes
from dsv4.config import ModelConfig
from dsv4.kernels.quant.reference import FP4_MAX, FP8_MAX, power_of_two_scale, round_to_fp4

CacheDtype = torch.dtype | Literal["shipped"]  # "shipped": as the published model stores it
KV_CACHE_DTYPES = ("auto", "bfloat16", "float32")

FP8_FLOOR = 1e-4  # of a block's largest value, as in kernels/quant
FP4_FLOOR = FP4_MAX * 2.0**-126
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
NAN_SCALE = 255


class RowFormat(Protocol):
    """Rows of `width` channels as tensors [..., columns] of `dtype`; zeros are a row of zeros."""

    @property
    def width(self) -> int: ...
    @property
    def columns(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def native(self) -> tuple[str, int, int]:
        """Kind, channels and rotated channels, for the native kernels."""
        ...

    def encode(self, x: Tensor) -> Tensor:
        """Rows [..., width] as stored."""
        ...

    def decode(self, rows: Tensor) -> Tensor:
        """Channels [..., width] of stored rows, in a floating-point dtype."""
        ...

    def round(self, x: Tensor) -> Tensor:
        """Rows as they come back from the cache, in x's dtype: so that fresh and cached keys are the same numbers."""
        ...


@dataclass(frozen=True)
class FloatRows:
    """Rows in a floating-point dtype."""

    width: int
    dtype: torch.dtype

    @property
    def columns(self) -> int:
        return self.width

    @property
    def native(self) -> tuple[str, int, int]:
        return str(self.dtype).removeprefix("torch."), self.width, 0

    def encode(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)

    def decode(self, rows: Tensor) -> Tensor:
        return rows

    def round(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).to(x.dtype) if self.dtype.itemsize < x.dtype.itemsize else x


@dataclass(frozen=True)
class ShippedKeys:
    """Window keys and entries of shipped numerics: FP8, and BF16 in the last `rotary` channels."""

    width: int
    rotary: int
    columns: int
    dtype: torch.dtype = torch.uint8

    @property
    def native(self) -> tuple[str, int, int]:
        return "fp8", self.width, self.rotary

    def encode(self, x: Tensor) -> Tensor:
        plain = self.width - self.rotary
        values, scales = _scaled_blocks(x[..., :plain], KV_BLOCK, FP8_MAX, FP8_FLOOR)
        codes = values.to(torch.float8_e4m3fn).view(torch.uint8).flatten(-2)[..., :plain]
        rotated = x[..., plain:].to(torch.bfloat16).contiguous().view(torch.uint8)
        pad = scales.new_zeros(*scales.shape[:-1], self.columns - plain - 2 * self.rotary - scales.shape[-1])
        return torch.cat((codes, rotated, scales, pad), dim=-1)

    def decode(self, rows: Tensor) -> Tensor:
        plain, end = self.width - self.rotary, self.width + self.rotary
        codes = rows[..., :plain].contiguous().view(torch.float8_e4m3fn).float()
        rotated = rows[..., plain:end].contiguous().view(torch.bfloat16).float()
        scales = rows[..., end : end - (-plain // KV_BLOCK)]
        return torch.cat((_times_scales(codes, scales, KV_BLOCK), rotated), dim=-1)

    def round(self, x: Tensor) -> Tensor:
        return x


@dataclass(frozen=True)
class ShippedIndexKeys:
    """Index keys of shipped numerics: FP4."""

    width: int
    columns: int
    dtype: torch.dtype = torch.uint8

    @property
    def native(self) -> tuple[str, int, int]:
        return "fp4", self.width, 0

    def encode(self, x: Tensor) -> Tensor:
        values, scales = _scaled_blocks(x, FP4_GROUP, FP4_MAX, FP4_FLOOR)
        magnitude = round_to_fp4(values).abs()
        codes = torch.where(magnitude < 2, 2 * magnitude, torch.where(magnitude < 4, magnitude + 2, magnitude / 2 + 4))
        nibbles = (codes.to(torch.uint8) + 8 * values.signbit().to(torch.uint8)).flatten(-2)
        packed = (nibbles[..., ::2] | nibbles[..., 1::2] << 4)[..., : (self.width + 1) // 2]
        return torch.cat((packed, scales), dim=-1)

    def decode(self, rows: Tensor) -> Tensor:
        packed, scales = rows[..., : (self.width + 1) // 2], rows[..., (self.width + 1) // 2 :]
        nibbles = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)[..., : self.width]
        values = torch.tensor(E2M1, device=rows.device)[nibbles.int()]
        return _times_scales(values, scales, FP4_GROUP)

    def round(self, x: Tensor) -> Tensor:
        return x


def cache_dtype(name: str, numerics: str, dtype: torch.dtype) -> CacheDtype:
    """Dtype of the cache of a model of `dtype`, by its name in KV_CACHE_DTYPES; ValueError names another."""
    if name not in KV_CACHE_DTYPES:
        raise ValueError(f"kv_cache_dtype {name!r}: allowed are {', '.join(KV_CACHE_DTYPES)}")
    if name == "auto":
        return "shipped" if numerics == "shipped" else dtype
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def key_format(config: ModelConfig, dtype: CacheDtype) -> RowFormat:
    """Format of window keys and entries."""
    if isinstance(dtype, torch.dtype):
        return FloatRows(config.head_dim, dtype)
    return ShippedKeys(config.head_dim, config.qk_rope_head_dim, entry_bytes(config))


def index_key_format(config: ModelConfig, dtype: CacheDtype) -> RowFormat:
    """Format of index keys."""
    if isinstance(dtype, torch.dtype):
        return FloatRows(config.index_head_dim, dtype)
    return ShippedIndexKeys(config.index_head_dim, index_key_bytes(config))


def _scaled_blocks(x: Tensor, block: int, largest: float, floor: float) -> tuple[Tensor, Tensor]:
    """(x / scale [..., blocks, block] padded with zeros, E8M0 scales uint8 [..., blocks]) of x [..., n]."""
    x = torch.nn.functional.pad(x.float(), (0, -x.shape[-1] % block)).unflatten(-1, (-1, block))
    amax = x.abs().amax(-1, keepdim=True)
    finite = amax < float("inf")  # NaN is not
    scale = power_of_two_scale(amax.clamp(min=floor).masked_fill(~finite, 1.0), largest)
    byte = (scale.view(torch.int32) >> 23).masked_fill(~finite, NAN_SCALE).to(torch.uint8)
    return (x / scale).masked_fill(~finite, 0.0).clamp(-largest, largest), byte.squeeze(-1)


def _times_scales(values: Tensor, scales: Tensor, block: int) -> Tensor:
    """values [..., n] times their blocks' E8M0 scales uint8 [..., blocks]; byte 0, of blank rows alone, is 0."""
    factors = (scales.int() << 23).view(torch.float32).masked_fill(scales == NAN_SCALE, float("nan"))
    return values * factors.repeat_interleave(block, dim=-1)[..., : values.shape[-1]]
