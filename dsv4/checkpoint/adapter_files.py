"""LoRA adapters as PEFT writes them: adapter_config.json and adapter_model.safetensors, in transformers' names.

PEFT keeps the adapters of a layer's stacked experts in one matrix each: A [E * rank, in] expert by expert, B [out,
rank * E] with the experts side by side within each rank. gate_up_proj has w1's rows, then w3's, so that the adapters of
both are one of twice the rank.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from dsv4.analysis.inventory import tensor_inventory
from dsv4.checkpoint import names
from dsv4.checkpoint.atomic import new_file
from dsv4.checkpoint.errors import CheckpointError
from dsv4.checkpoint.files import write_json
from dsv4.checkpoint.shards import read_json
from dsv4.config import ModelConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_TO_MODULE = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^head$", "lm_head"),
        (r"^layers\.", "model.layers."),
        (r"\.attn\.indexer\.compressor\.", ".attn.compressor.indexer."),
        (r"\.attn\.indexer\.weights_proj$", ".attn.compressor.indexer.scorer.weights_proj"),
        (r"\.attn\.indexer\.", ".attn.compressor.indexer."),
        (r"\.attn\.", ".self_attn."),
        (r"\.wq_(a|b)$", r".q_\1_proj"),
        (r"\.wkv$", ".kv_proj"),
        (r"\.wo_b$", ".o_b_proj"),
        (r"\.wgate$", ".gate_proj"),
        (r"\.ffn\.", ".mlp."),
        (r"\.shared_experts\.w1$", ".shared_experts.gate_proj"),
        (r"\.shared_experts\.w2$", ".shared_experts.down_proj"),
        (r"\.shared_experts\.w3$", ".shared_experts.up_proj"),
    )
]
_KEY = re.compile(rf"^{re.escape(_PREFIX)}(.+?)(\.base_layer)*\.lora_([AB])\.weight$")
# Keys of adapter_config.json that change what an adapter computes, with the only values that are read here. PEFT takes
# the first product of the other initializations (PiSSA, OLoRA, CorDA, ...) off the base weight, or quantizes that.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, []),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "alora_invocation_tokens": (False, None),
    "arrow_config": (False, None),
    "kasa_config": (False, None),
    "monteclora_config": (False, None),
}


class Pair(NamedTuple):
    """The two matrices of an adapter: A [rank, in] and B [out, rank]; of a stack of experts [E, ...] each."""

    a: Tensor
    b: Tensor


class Adapter:
    """An adapter's folder: what it adds to the matrices of the model that it was trained on.

    CheckpointError if a file is damaged, asks for more than plain LoRA, or is of another model than `config`.
    """

    def __init__(self, folder: str | Path, config: ModelConfig) -> None:
        self.folder = Path(folder)
        self.settings = read_json(self.folder / CONFIG)
        self._config = config
        for key, allowed in _PLAIN.items():
            if self.settings.get(key, allowed[-1]) not in allowed:
                found = f"{key} {self.settings[key]!r}"
                raise CheckpointError(self.folder / CONFIG, f"{key} {' or '.join(map(repr, allowed))}", found)
        for key in ("r", "lora_alpha"):
            value = self.settings.get(key)
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise CheckpointError(self.folder / CONFIG, f"a number as {key}", repr(value))
        self._parts: dict[str, tuple[str, int | None, int | None]] = {}
        self._pairs = self._read()
        known = {spec.name for spec in tensor_inventory(config, "fp32")}
        for name, (module, _, _) in self._parts.items():
            if name not in known:
                raise CheckpointError(self.folder / WEIGHTS, "matrices of the model", "an adapter of another", module)

    @property
    def names(self) -> Collection[str]:
        """Official names of the adapted matrices."""
        return self._parts

    def apply(self, name: str, values: Tensor) -> Tensor:
        """The official matrix `name` with the adapter's product added, float32; others unchanged."""
        if name not in self._parts:
            return values
        module, expert, half = self._parts[name]
        pair = self._pairs[module]
        a, b = (pair.a, pair.b) if expert is None else (pair.a[expert], pair.b[expert])
        if half is not None:
            b = b.chunk(2)[half]
        if tuple(values.shape) != (b.shape[0], a.shape[1]):
            found = f"an adapter of {[b.shape[0], a.shape[1]]}"
            raise CheckpointError(self.folder / WEIGHTS, f"one of the matrix {list(values.shape)}", found, name)
        return torch.addmm(values.float(), b, a, alpha=self._scale(module, a.shape[0]))

    def _scale(self, module: str, rank: int) -> float:
        alpha = self._pattern("alpha_pattern", module, self.settings["lora_alpha"])
        return alpha / (rank**0.5 if self.settings.get("use_rslora") else rank)

    def _pattern(self, key: str, module: str, default: float) -> float:
        """PEFT's rule: the value of the first pattern that matches the end of the module's name."""
        patterns: dict[str, float] = self.settings.get(key) or {}
        for pattern, value in patterns.items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return default

    def _read(self) -> dict[str, Pair]:
        file, config = self.folder / WEIGHTS, self._config
        try:
            tensors = load_file(file)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(file, "an adapter's tensors", str(error)) from error
        found: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            match = _KEY.match(key)
            if match is None or tensor.dim() != 2:
                raise CheckpointError(file, "matrices lora_A and lora_B of PEFT", f"shape {list(tensor.shape)}", key)
            found.setdefault(match[1] + (match[2] or ""), {})[match[3]] = tensor.float()
        pairs: dict[str, Pair] = {}
        for module, parts in found.items():
            if parts.keys() != {"A", "B"}:
                raise CheckpointError(file, "lora_A and lora_B", f"lora_{' and '.join(parts)} alone", module)
            pair = Pair(parts["A"], parts["B"])
            name = module.removesuffix(".base_layer")
            if name.endswith(".experts"):
                gate_up = pair.a.shape[1] == config.hidden_size and pair.b.shape[0] == 2 * config.moe_intermediate_size
                name, pair = f"{name}.{'gate_up_proj' if gate_up else 'down_proj'}", _unstack(pair, config)
            self._name_parts(name)
            pairs[name] = pair
        return pairs

    def _name_parts(self, module: str) -> None:
        official = names.to_official(module)
        merged = names.merged_parts(official, self._config.n_routed_experts)
        for part in merged:
            self._parts[part.name] = module, part.expert, part.half
        if not merged:
            self._parts[names.to_official(f"{module}.weight")] = module, None, None


def write_adapter(pairs: Mapping[str, Pair], rank: int, alpha: float, base: str, folder: Path) -> None:
    """Write adapters, by the module's names of their matrices, to `folder`, over an older adapter there.

    base: the model that they were trained on, for those who load them.
    """
    tensors: dict[str, Tensor] = {}
    modules: list[str] = []
    parameters: list[str] = []
    stacks: dict[str, dict[str, Pair]] = {}
    for name, pair in pairs.items():
        owner, _, leaf = name.rpartition(".")
        if owner.endswith(".experts"):
            stacks.setdefault(owner, {})[leaf] = pair
            continue
        modules.append(to_module(name))
        _add(tensors, modules[-1], pair)
    for owner, stack in stacks.items():
        module, inner = to_module(owner), "w1" in stack and "w2" in stack
        if "w1" in stack:
            parameters.append(f"{module}.gate_up_proj")
            _add(tensors, f"{module}.base_layer" if inner else module, _stacked(_join(stack["w1"], stack["w3"])))
        if "w2" in stack:
            parameters.append(f"{module}.down_proj")
            _add(tensors, module, _stacked(stack["w2"]))
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank, "lora_alpha": alpha,
        "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
        "target_modules": modules, "target_parameters": parameters,
        "rank_pattern": {r".*\.gate_up_proj": 2 * rank} if any("w1" in stack for stack in stacks.values()) else {},
        "alpha_pattern": {r".*\.gate_up_proj": 2 * alpha} if any("w1" in stack for stack in stacks.values()) else {},
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    with new_file(folder / WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    with new_file(folder / CONFIG) as temporary:
        write_json(temporary, settings)


def to_module(name: str) -> str:
    """transformers' name of the module of an official matrix (without ".weight"); MTP blocks, which it lacks, keep
    theirs."""
    if name.startswith("mtp."):
        return name
    for pattern, replacement in _TO_MODULE:
        name = pattern.sub(replacement, name)
    return name


def _add(tensors: dict[str, Tensor], module: str, pair: Pair) -> None:
    tensors[f"{_PREFIX}{module}.lora_A.weight"] = pair.a.cpu().contiguous()
    tensors[f"{_PREFIX}{module}.lora_B.weight"] = pair.b.cpu().contiguous()


def _join(first: Pair, second: Pair) -> Pair:
    """Adapter of two stacks of matrices with the same input, one upon the other."""
    above = torch.cat((first.b, torch.zeros_like(second.b)), 2)
    below = torch.cat((torch.zeros_like(first.b), second.b), 2)
    return Pair(torch.cat((first.a, second.a), 1), torch.cat((above, below), 1))


def _stacked(pair: Pair) -> Pair:
    """[E, ...] -> PEFT's matrices for a stack."""
    return Pair(pair.a.flatten(0, 1), pair.b.permute(1, 2, 0).flatten(1))


def _unstack(pair: Pair, config: ModelConfig) -> Pair:
    """The inverse of `_stacked`."""
    experts = config.n_routed_experts
    a = pair.a.reshape(experts, -1, pair.a.shape[1])
    return Pair(a, pair.b.reshape(pair.b.shape[0], -1, experts).permute(2, 0, 1))
