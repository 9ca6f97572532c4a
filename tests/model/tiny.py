"""Small models with V4's parts in odd proportions, and weights large enough that every part affects the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv4.checkpoint import formats
from dsv4.config import ModelConfig
from dsv4.kernels.stored import StoredStack, StoredTensor, matrices_of, widen_bf16
from dsv4.model.linear import Linear
from dsv4.model.moe import Experts
from dsv4.model.stacks import official_tensors
from dsv4.model.transformer import Transformer

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_hash_layers": 1,
    "compress_ratios": (0, 4, 128, 4, 0),
    "num_attention_heads": 4,
    "head_dim": 32,
    "qk_rope_head_dim": 16,
    "q_lora_rank": 48,
    "o_groups": 2,
    "o_lora_rank": 24,
    "index_n_heads": 3,
    "index_head_dim": 32,
    "index_topk": 8,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "routed_scaling_factor": 1.5,
}


def tiny_config(**changes: Any) -> ModelConfig:
    """SHAPE with changes. `schedule` gives the main layers' ratios; the MTP block's 0 is added."""
    if "schedule" in changes:
        schedule = tuple(changes.pop("schedule"))
        changes |= {"compress_ratios": (*schedule, 0), "num_hidden_layers": len(schedule)}
        changes.setdefault("num_hash_layers", min(1, len(schedule)))
    return ModelConfig(**{**SHAPE, **changes})


@torch.no_grad()
def randomize(model: Transformer, seed: int) -> None:
    """Every parameter random, matrices N(0, 1 / inputs): no part of the model is the identity or switched off."""
    g = torch.Generator().manual_seed(seed)
    for name, p in official_tensors(dict(model.named_parameters())).items():
        noise = torch.randn(p.shape, generator=g)
        if name.endswith(("norm.weight", "_scale")):
            value = 1 + 0.2 * noise
        elif name.endswith("embed.weight"):
            value = noise
        elif p.dim() > 1 and not name.endswith("ape"):
            value = noise * p.shape[-1] ** -0.5
        else:  # sinks, ape, router bias, mHC base
            value = 0.4 * noise
        p.copy_(value)
    c = model.config
    for name, table in model.named_buffers():
        if name.endswith("tid2eid"):  # distinct experts per token
            deal = torch.rand(c.vocab_size, c.n_routed_experts, generator=g).argsort(-1)
            table.copy_(deal[:, : c.num_experts_per_tok])


def random_model(config: ModelConfig, seed: int = 0, numerics: str = "float") -> Transformer:
    model = Transformer(config, numerics)
    randomize(model, seed)
    return model.freeze()


def store(model: Transformer) -> Transformer:
    """Store the matrices as in a checkpoint: experts FP4 (FP8 if groups of 32 do not fit), the head BF16, other linear
    layers FP8. Returns the model."""
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            for weight in ("w1", "w2", "w3"):
                stack = StoredStack([_store_expert(matrix) for matrix in matrices_of(getattr(module, weight).detach())])
                setattr(module, weight, torch.nn.Parameter(stack, requires_grad=False))
        elif isinstance(module, Linear):
            values = module.weight.detach()
            stored = StoredTensor("bf16", values.bfloat16(), None, widen_bf16) if name == "head" else _fp8(values)
            module.weight = torch.nn.Parameter(stored, requires_grad=False)
    return model.refresh()


def _store_expert(values: Tensor) -> StoredTensor:
    if values.shape[1] % 32:
        return _fp8(values)
    return StoredTensor("fp4", *formats.quantize_fp4(values), formats.dequantize_fp4)


def _fp8(values: Tensor) -> StoredTensor:
    return StoredTensor("fp8", *formats.quantize_fp8(values, torch.float8_e8m0fnu), formats.dequantize_fp8)


def random_ids(config: ModelConfig, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, config.vocab_size, shape, generator=torch.Generator().manual_seed(1000 + seed))


def deviation(got: Tensor, want: Tensor) -> float:
    """Largest absolute difference over the largest absolute value of `want`."""
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())
