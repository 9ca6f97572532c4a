"""Model folders with random weights: random values that are quantized, or random codes and scales."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dsv4.analysis.inventory import StorageLayout, TensorSpec, tensor_inventory
from dsv4.checkpoint import save_model
from dsv4.checkpoint.atomic import new_folder
from dsv4.checkpoint.files import TORCH_DTYPES, ShardWriter, write_json
from dsv4.checkpoint.shards import SINGLE_NAME
from dsv4.checkpoint.writing import Format
from dsv4.config import ModelConfig
from dsv4.kernels.quant import FP8_MAX
from dsv4.model.stacks import official_tensors
from dsv4.model.transformer import Transformer

# Root mean square of the codes' values: E2M1 drawn uniformly, E4M3 from a normal distribution.
_RMS = {"I8": 2.9, "F8_E4M3": 100.0}
_CODES = "uniform E2M1, normal E4M3"
_E8M0_BIAS = 127


@torch.no_grad()
def write_random_values(config: ModelConfig, folder: Path, seed: int, layout: Format) -> None:
    """Write `folder`, replacing it. No parameter is all zeros or ones, so that each affects the logits."""
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(config)
    model.init_weights(generator)  # for the hash tables, which spread the experts evenly
    for name, p in official_tensors(dict(model.named_parameters())).items():
        p.normal_(std=0.3 if p.dim() == 1 else p.shape[-1] ** -0.5, generator=generator)
        if name.endswith("norm.weight"):
            p.add_(1.0)
    save_model(model, config, folder, layout, overwrite=True)


def write_random_checkpoint(config: ModelConfig, folder: Path, seed: int, layout: StorageLayout = "official") -> None:
    """Write codes tensor by tensor unless this config's folder exists. Scales keep outputs about as large as inputs."""
    described = config.to_dict(quantized=layout in ("official", "official-base"))
    stamp = {**described, "random_seed": seed, "codes": _CODES}
    if (folder / "seed.json").is_file() and json.loads((folder / "seed.json").read_text()) == stamp:
        return
    specs = list(tensor_inventory(config, layout))
    weights = {spec.name.removesuffix("weight") + "scale": spec for spec in specs if spec.dtype in _RMS}
    generator = np.random.default_rng(seed)
    with new_folder(folder, overwrite=True) as temporary:
        with ShardWriter(temporary / SINGLE_NAME, specs) as shard:
            for spec in specs:
                shard.write(spec.name, _draw(spec, weights.get(spec.name), config, generator))
        write_json(temporary / "config.json", described)
        write_json(temporary / "seed.json", stamp)


def _draw(spec: TensorSpec, weight: TensorSpec | None, config: ModelConfig, generator: np.random.Generator) -> Tensor:
    """Draw one stored tensor; `weight` is the matrix of a tensor of scales, else None."""
    dtype = TORCH_DTYPES[spec.dtype]
    if spec.dtype == "I64":
        return torch.from_numpy(generator.integers(config.n_routed_experts, size=spec.shape))
    if weight is not None:
        columns = weight.shape[1] * (2 if weight.dtype == "I8" else 1)
        exponent = round(np.log2(columns**-0.5 / _RMS[weight.dtype]))
        codes = generator.integers(_E8M0_BIAS + exponent - 1, _E8M0_BIAS + exponent + 1, spec.shape, dtype=np.uint8)
        scales = torch.from_numpy(codes).view(torch.float8_e8m0fnu)
        return scales if dtype == scales.dtype else scales.to(dtype)
    if spec.dtype == "F8_E4M3":
        numbers = _RMS[spec.dtype] * torch.from_numpy(generator.standard_normal(spec.shape, dtype=np.float32))
        return numbers.clamp_(-FP8_MAX, FP8_MAX).to(dtype)
    if spec.dtype in _RMS:
        codes = np.frombuffer(generator.bytes(spec.num_bytes), dtype=np.uint8).reshape(spec.shape).copy()
        return torch.from_numpy(codes).view(dtype)
    values = generator.standard_normal(spec.shape, dtype=np.float32)
    values *= 0.3 if len(spec.shape) == 1 else spec.shape[-1] ** -0.5
    if spec.name.endswith("norm.weight"):
        values += 1.0
    return torch.from_numpy(values).to(dtype)
