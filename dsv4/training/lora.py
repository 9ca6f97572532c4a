"""Adapters on chosen matrices of a model, all else frozen; their files in PEFT's layout."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from dsv4.analysis.adapters import AdaptedMatrix, Adapters
from dsv4.analysis.inventory import checkpoint_bytes
from dsv4.analysis.precision import Precision
from dsv4.analysis.training_memory import ROUNDED_BYTES
from dsv4.analysis.training_weights import weights_by_part
from dsv4.checkpoint import load_model
from dsv4.checkpoint.adapter_files import Pair, write_adapter
from dsv4.config import ModelConfig
from dsv4.kernels import backends
from dsv4.model.attention.indexer import Indexer
from dsv4.model.linear import Linear
from dsv4.model.lora import LoraExperts, LoraLinear
from dsv4.model.moe import Experts
from dsv4.model.transformer import Transformer
from dsv4.training.lora_settings import AdapterOptimizer, LoraSettings

# Names of groups of matrices, as regular expressions for the rest of the name behind "layers.3.".
GROUPS = {
    "attention": r"attn\.(wq_a|wq_b|wkv|wo_b)",
    "experts": r"ffn\.experts\.w[123]",
    "shared_experts": r"ffn\.shared_experts\.w[123]",
    "compressor": r"attn\.compressor\.(wkv|wgate)",
    "indexer": r"attn\.indexer\.(wq_b|weights_proj|compressor\.(wkv|wgate))",
}
HEAD = "head"
MADE = r"(^head|compressor\.(wkv|wgate)|indexer\.weights_proj)$"  # matrices of which W + B A is made (Linear.matrix)


def adaptable(model: Transformer) -> list[str]:
    """Names of the matrices that can have an adapter, in the model's order.

    Not `wo_a`, a matrix per group of heads in one, whose adapter PEFT could not compute.
    """
    names: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            names += [f"{name}.{stack}" for stack in ("w1", "w2", "w3")]
        elif isinstance(module, Linear) and not name.endswith(".wo_a"):
            names.append(name)
    return names


def check_targets(targets: Sequence[str], config: ModelConfig) -> None:
    """ValueError unless every target names a matrix of such a model."""
    with torch.device("meta"):
        chosen(targets, adaptable(Transformer(config)))


def planned(settings: LoraSettings, optimizer: AdapterOptimizer, config: ModelConfig) -> Adapters:
    """The adapters of such a model, for plans and for the count of a step's operations."""
    with torch.device("meta"):
        model = Transformer(config)
    uses = {HEAD: 1 + config.num_nextn_predict_layers}
    uses |= {f"mtp.{block}.h_proj": config.hc_mult for block in range(config.num_nextn_predict_layers)}
    found: list[AdaptedMatrix] = []
    for name in chosen(settings.targets, adaptable(model)):
        block = re.match(r"(layers|mtp)\.\d+", name)
        part, rest = (block[0], name[block.end() + 1 :]) if block else (name, name)
        owner, _, leaf = name.rpartition(".")
        stack = model.get_submodule(owner)
        if isinstance(stack, Experts):
            experts, rows, columns = getattr(stack, leaf).shape
            found.append(AdaptedMatrix(part, rest, rows, columns, experts, config.num_experts_per_tok))
        else:
            rows, columns = model.get_parameter(f"{name}.weight").shape
            made = re.search(MADE, name) is not None
            found.append(AdaptedMatrix(part, rest, rows, columns, uses=uses.get(name, 1), whole=made))
    return Adapters(settings.rank, tuple(found), optimizer == "muon")


def chosen(targets: Sequence[str], names: Sequence[str]) -> list[str]:
    """The matrices among `names` that `targets` name.

    ValueError for a target without a matrix, and for a stack of experts' w1 without w3 or the reverse.
    """
    found: set[str] = set()
    for target in targets:
        group = rf"layers\.\d+\.{GROUPS[target]}" if target in GROUPS else None
        matches = {n for n in names if (re.fullmatch(group, n) if group else fnmatchcase(n, target))}
        if not matches:
            raise ValueError(
                f"lora.targets has {target!r}, which is no matrix of this model; allowed: {', '.join(GROUPS)}, {HEAD}, "
                f"and patterns of names such as {names[0]}"
            )
        found |= matches
    for name in sorted(found):
        stack, _, kind = name.rpartition(".")
        other = f"{stack}.{ {'w1': 'w3', 'w3': 'w1'}.get(kind) }"
        if stack.endswith(".experts") and kind != "w2" and other not in found:
            raise ValueError(f"lora.targets has {name} without {other}, which other programs keep as one matrix")
    return [name for name in names if name in found]


def add_adapters(model: Transformer, settings: LoraSettings, generator: torch.Generator) -> list[str]:
    """Freeze every parameter of `model` and give the chosen matrices adapters, which take gradients; their names.

    Stored weights stay stored.
    """
    names = chosen(settings.targets, adaptable(model))
    model.train()  # thaws; requires_grad_() would widen stored weights
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    stacks: dict[str, list[str]] = {}  # module with adapters -> its adapted stacks, none of a linear layer
    for name in names:
        owner, _, leaf = name.rpartition(".")
        if isinstance(model.get_submodule(owner), Experts):
            stacks.setdefault(owner, []).append(leaf)
        else:
            stacks[name] = []
    for path, leaves in stacks.items():
        base = model.get_submodule(path)
        if isinstance(base, Experts):
            adapted = LoraExperts(base, leaves, settings.rank, settings.scale, generator)
        else:
            assert isinstance(base, Linear)
            adapted = LoraLinear(base, settings.rank, settings.scale, generator)
        owner, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(owner), leaf, adapted)
    for layer in model.modules():
        if isinstance(layer, Indexer):
            layer.learns = any(parameter.requires_grad for parameter in layer.parameters())
    return names


def load_adapted(folder: Path, settings: LoraSettings, device: torch.device, generator: torch.Generator) -> Transformer:
    """Model of a folder with adapters. On a CPU with native kernels its weights stay as they are stored."""
    model = load_model(folder, device=device)
    add_adapters(model, settings, generator)
    return model


def stored_bytes(folder: Path | None, config: ModelConfig, precision: Precision) -> int | None:
    """Bytes of a model folder's weights in `load_adapted`'s model on a CPU; None where it widens them to fp32.

    folder: None for a preset, as it is published. In FP8 with the numbers that products read, made of stored ones for
    each product and kept for its backward.
    """
    if backends.native_module() is None:
        return None
    if folder is None:
        files = checkpoint_bytes(config)
    else:
        files = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    rounded = sum(part.rounded for part in weights_by_part(config).values()) if precision == "fp8" else 0
    return files + ROUNDED_BYTES * rounded


def adapter_pairs(model: Transformer) -> dict[str, Pair]:
    """(A, B) by name of the matrix."""
    pairs: dict[str, Pair] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            pairs[name] = Pair(module.lora_A.detach(), module.lora_B.detach())
        elif isinstance(module, LoraExperts):
            for stack in module.lora_A:
                pairs[f"{name}.{stack}"] = Pair(module.lora_A[stack].detach(), module.lora_B[stack].detach())
    return pairs


def save_adapter(pairs: Mapping[str, Pair], settings: LoraSettings, base: str, folder: Path) -> None:
    """Write adapters that were trained on the model `base`, by name of the matrix, to `folder` as PEFT does."""
    write_adapter(pairs, settings.rank, settings.alpha, base, folder)
