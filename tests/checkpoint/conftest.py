"""An independent writer of official checkpoints: numpy, float64, search in the table of all codes, safetensors' writer.

It shares only the config class with dsv4: names, shapes and dtypes are transcribed from the published list.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dsv4.config import ModelConfig

Array = np.ndarray[Any, Any]


def e4m3_table() -> Array:
    """Value of each of the 256 FP8 codes, from the bit fields; codes 127 and 255 are NaN."""
    values: list[float] = []
    for code in range(256):
        sign, exponent, mantissa = -1.0 if code & 128 else 1.0, code >> 3 & 15, code & 7
        value = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
        values.append(np.nan if code & 127 == 127 else sign * value)
    return np.array(values)


def e2m1_table() -> Array:
    values: list[float] = []
    for code in range(16):
        sign, exponent, mantissa = -1.0 if code & 8 else 1.0, code >> 1 & 3, code & 1
        value = mantissa * 0.5 if exponent == 0 else (2 + mantissa) * 2.0 ** (exponent - 2)
        values.append(sign * value)
    return np.array(values)


def nearest_code(scaled: Array, table: Array) -> Array:
    """Nearest non-negative code of |scaled|, ties to the even code, clamped; then the sign bit (half the table)."""
    magnitudes = table[: len(table) // 2]
    magnitudes = magnitudes[np.isfinite(magnitudes)]
    size = np.abs(scaled)
    upper = np.searchsorted(magnitudes, size).clip(1, len(magnitudes) - 1)
    below, above = size - magnitudes[upper - 1], magnitudes[upper] - size
    code = np.where((below < above) | ((below == above) & (upper % 2 == 1)), upper - 1, upper)
    return (code + np.signbit(scaled) * (len(table) // 2)).astype(np.uint8)


def blocked_scales(weight: Array, rows: int, columns: int, largest: float, zero: int) -> Array:
    """Exponent of the training rule for each block: the smallest e with amax <= largest * 2^e; `zero` if amax is 0."""
    amax = block_amax(weight, rows, columns)
    limits = largest * 2.0 ** np.arange(-127, 128)
    return np.where(amax == 0, zero, np.searchsorted(limits, amax) - 127)


def block_amax(weight: Array, rows: int, columns: int) -> Array:
    by_rows = np.maximum.reduceat(np.abs(weight), np.arange(0, weight.shape[0], rows), 0)
    return np.maximum.reduceat(by_rows, np.arange(0, weight.shape[1], columns), 1)


class Oracle:
    """The official kernel's rule in plain numpy; `weight` is float64 [out, in]."""

    e4m3 = e4m3_table()
    e2m1 = e2m1_table()

    @classmethod
    def fp8(cls, weight: Array) -> tuple[Array, Array]:
        """-> (uint8 codes [out, in], uint8 E8M0 scales [ceil(out/128), ceil(in/128)])."""
        exponents = blocked_scales(weight, 128, 128, 448.0, -22)
        scale = cls.expand(2.0**exponents, 128, 128, weight.shape)
        return nearest_code(weight / scale, cls.e4m3), (exponents + 127).astype(np.uint8)

    @classmethod
    def fp8_f32(cls, weight: Array) -> tuple[Array, Array]:
        """Base layout -> (uint8 codes, float32 scales amax / 448)."""
        amax = block_amax(weight, 128, 128)
        scales = np.where(amax == 0, 1.0, amax / 448.0).astype(np.float32)
        return nearest_code(weight / cls.expand(scales, 128, 128, weight.shape), cls.e4m3), scales

    @classmethod
    def fp4(cls, weight: Array) -> tuple[Array, Array]:
        """-> (uint8 [out, in/2], low nibble first, uint8 E8M0 scales [out, ceil(in/32)])."""
        exponents = blocked_scales(weight, 1, 32, 6.0, -126)
        codes = nearest_code(weight / cls.expand(2.0**exponents, 1, 32, weight.shape), cls.e2m1)
        return codes[:, 0::2] | codes[:, 1::2] << 4, (exponents + 127).astype(np.uint8)

    @classmethod
    def read_fp8(cls, codes: Array, scales: Array) -> Array:
        """`scales`: float multipliers, one per block."""
        return cls.e4m3[codes] * cls.expand(scales, 128, 128, codes.shape)

    @classmethod
    def read_fp4(cls, packed: Array, scales: Array) -> Array:
        codes = np.stack([packed & 15, packed >> 4], -1).reshape(packed.shape[0], -1)
        return cls.e2m1[codes] * cls.expand(scales, 1, 32, codes.shape)

    @staticmethod
    def expand(grid: Array, rows: int, columns: int, shape: tuple[int, ...]) -> Array:
        return grid.repeat(rows, 0).repeat(columns, 1)[: shape[0], : shape[1]]


@pytest.fixture(scope="session")
def oracle() -> type[Oracle]:
    return Oracle


def parameters(config: ModelConfig) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(name, storage in the instruct layout, shape) of every official parameter and table."""
    d, v, hc, c = config.hidden_size, config.vocab_size, config.hc_mult, config.head_dim
    mi, ql, e = config.moe_intermediate_size, config.q_lora_rank, config.n_routed_experts
    h, low, ih, ic = config.num_attention_heads, config.o_groups * config.o_lora_rank, config.index_n_heads, 0
    ic = config.index_head_dim

    def head(prefix: str) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        yield from (
            (f"{prefix}hc_head_{n}", "f32", s) for n, s in (("fn", (hc, hc * d)), ("base", (hc,)), ("scale", (1,)))
        )
        yield f"{prefix}norm.weight", "bf16", (d,)

    def compressor(prefix: str, ratio: int, dim: int) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        wide = 2 * dim if ratio == 4 else dim
        yield f"{prefix}ape", "f32", (ratio, wide)
        yield f"{prefix}wkv.weight", "bf16", (wide, d)
        yield f"{prefix}wgate.weight", "bf16", (wide, d)
        yield f"{prefix}norm.weight", "bf16", (dim,)

    def block(prefix: str, ratio: int, hashed: bool) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        for site in ("attn", "ffn"):
            yield f"{prefix}hc_{site}_fn", "f32", ((2 + hc) * hc, hc * d)
            yield f"{prefix}hc_{site}_base", "f32", ((2 + hc) * hc,)
            yield f"{prefix}hc_{site}_scale", "f32", (3,)
            yield f"{prefix}{site}_norm.weight", "bf16", (d,)
        yield f"{prefix}attn.attn_sink", "f32", (h,)
        yield f"{prefix}attn.wq_a.weight", "fp8", (ql, d)
        yield f"{prefix}attn.q_norm.weight", "bf16", (ql,)
        yield f"{prefix}attn.wq_b.weight", "fp8", (h * c, ql)
        yield f"{prefix}attn.wkv.weight", "fp8", (c, d)
        yield f"{prefix}attn.kv_norm.weight", "bf16", (c,)
        yield f"{prefix}attn.wo_a.weight", "fp8", (low, h * c // config.o_groups)
        yield f"{prefix}attn.wo_b.weight", "fp8", (d, low)
        if ratio:
            yield from compressor(f"{prefix}attn.compressor.", ratio, c)
        if ratio == 4:
            yield f"{prefix}attn.indexer.wq_b.weight", "fp8", (ih * ic, ql)
            yield f"{prefix}attn.indexer.weights_proj.weight", "bf16", (ih, d)
            yield from compressor(f"{prefix}attn.indexer.compressor.", 4, ic)
        yield f"{prefix}ffn.gate.weight", "bf16", (e, d)
        if hashed:
            yield f"{prefix}ffn.gate.tid2eid", "i64", (v, config.num_experts_per_tok)
        else:
            yield f"{prefix}ffn.gate.bias", "f32", (e,)
        for expert in (*(f"experts.{i}" for i in range(e)), "shared_experts"):
            kind = "fp8" if expert == "shared_experts" else "expert"
            yield f"{prefix}ffn.{expert}.w1.weight", kind, (mi, d)
            yield f"{prefix}ffn.{expert}.w2.weight", kind, (d, mi)
            yield f"{prefix}ffn.{expert}.w3.weight", kind, (mi, d)

    yield "embed.weight", "bf16", (v, d)
    yield "head.weight", "bf16", (v, d)
    yield from head("")
    for layer in range(config.num_hidden_layers):
        yield from block(f"layers.{layer}.", config.compress_ratios[layer], layer < config.num_hash_layers)
    for draft in range(config.num_nextn_predict_layers):
        yield from block(f"mtp.{draft}.", 0, False)
        yield from head(f"mtp.{draft}.")
        for name in ("enorm", "hnorm"):
            yield f"mtp.{draft}.{name}.weight", "bf16", (d,)
        for name in ("e_proj", "h_proj"):
            yield f"mtp.{draft}.{name}.weight", "fp8", (d, d)


class Tiny:
    """A tiny model in one layout: `stored`, its tensors on disk; `values`, their values by official name."""

    def __init__(self, config: ModelConfig, layout: str, seed: int = 0) -> None:
        self.config, self.layout = config, layout
        self.stored: dict[str, torch.Tensor] = {}
        self.values: dict[str, torch.Tensor] = {}
        generator = np.random.default_rng(seed)
        for name, kind, shape in parameters(config):
            if kind == "i64":
                # Distinct experts per row: transformers and llama.cpp count a repeated one twice.
                deal = generator.random((shape[0], config.n_routed_experts)).argsort(-1)
                self.stored[name] = self.values[name] = torch.from_numpy(deal[:, : shape[1]].astype(np.int64))
                continue
            weight = generator.normal(size=shape) * (0.3 if len(shape) == 1 else shape[-1] ** -0.5)
            if len(shape) == 2:
                weight *= np.exp(generator.normal(size=(shape[0], 1)))
            self._store(name, kind, weight + (name.endswith("norm.weight")))

    def _store(self, name: str, kind: str, weight: Array) -> None:
        scale_name = name.removesuffix("weight") + "scale"
        quantized = self.layout in ("official", "official-base")
        if kind == "f32" or self.layout == "fp32" or not (quantized or self.layout == "bf16"):
            self.stored[name] = self.values[name] = torch.from_numpy(weight).float()
        elif kind == "bf16" or self.layout == "bf16":
            self.stored[name] = torch.from_numpy(weight).bfloat16()
            self.values[name] = self.stored[name].float()
        elif self.layout == "official-base":
            codes, scales = Oracle.fp8_f32(weight)
            self.stored[name] = torch.from_numpy(codes).view(torch.float8_e4m3fn)
            self.stored[scale_name] = torch.from_numpy(scales)
            self.values[name] = torch.from_numpy(Oracle.read_fp8(codes, scales.astype(np.float64))).float()
        else:
            codes, scales = Oracle.fp4(weight) if kind == "expert" else Oracle.fp8(weight)
            read = Oracle.read_fp4 if kind == "expert" else Oracle.read_fp8
            self.values[name] = torch.from_numpy(read(codes, 2.0 ** (scales.astype(np.float64) - 127))).float()
            dtype = torch.int8 if kind == "expert" else torch.float8_e4m3fn
            self.stored[name] = torch.from_numpy(codes).view(dtype)
            self.stored[scale_name] = torch.from_numpy(scales).view(torch.float8_e8m0fnu)

    def write(self, folder: Path, shards: int = 3) -> Path:
        """A folder as published: shards with the index file (shards=0: one file without), config, some other files."""
        folder.mkdir(parents=True, exist_ok=True)
        config = self.config.to_dict(quantized=self.layout in ("official", "official-base"))
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "generation_config.json").write_text('{"temperature": 1.0}')
        (folder / "tokenizer.json").write_text("{}")
        if not shards:
            save_file(self.stored, folder / "model.safetensors", metadata={"format": "pt"})
            return folder
        weight_map: dict[str, str] = {}
        for number in range(shards):
            file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
            part = {
                name: t for i, (name, t) in enumerate(self.stored.items()) if i * shards // len(self.stored) == number
            }
            save_file(part, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        total = sum(tensor.numel() * tensor.element_size() for tensor in self.stored.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder


TINY_SHAPE: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 160,
    "num_hidden_layers": 4,
    "num_hash_layers": 1,
    "compress_ratios": (0, 4, 128, 4, 0),
    "num_attention_heads": 4,
    "head_dim": 32,
    "qk_rope_head_dim": 8,
    "q_lora_rank": 40,
    "o_groups": 2,
    "o_lora_rank": 72,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 64,  # all entries: otherwise top-k meets ties, which transformers breaks by another rule
    "n_routed_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "routed_scaling_factor": 1.5,
}


@pytest.fixture(scope="session")
def tiny_config() -> ModelConfig:
    return ModelConfig(**TINY_SHAPE)


@pytest.fixture(scope="session")
def tiny() -> type[Tiny]:
    return Tiny


@pytest.fixture(scope="session")
def official(tiny_config: ModelConfig) -> Tiny:
    return Tiny(tiny_config, "official")


@pytest.fixture
def official_folder(official: Tiny, tmp_path: Path) -> Path:
    return official.write(tmp_path / "official")
