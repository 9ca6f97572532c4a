"""Read a model folder into a model, one tensor at a time: memory holds the model and one tensor."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from dsv4.analysis.inventory import tensor_inventory
from dsv4.checkpoint.errors import CheckpointError
from dsv4.checkpoint.folder import LOADED_SCALES, Checkpoint
from dsv4.model.transformer import Transformer


def iter_float_tensors(path: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Every official parameter and table of a folder, dequantised, one at a time; valid until the next one."""
    with Checkpoint(path) as checkpoint:
        for spec in tensor_inventory(checkpoint.config, "fp32"):
            yield spec.name, checkpoint.parameter(spec.name)


def load_model(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    numerics: str = "float",
) -> Transformer:
    """A model folder, official or as transformers saved it -> the model, in eval mode and frozen.

    Frozen: no parameter requires a gradient, so that plain calls run the native kernels; `model.requires_grad_(True)`
    before training.

    dtype: of the matrices. Norms and what the official layout stores as F32 (mHC, sinks, ape, router bias) are float32.
    The model remembers the scales of quantised weights, so that `save_model` writes unchanged weights as they were.
    """
    with Checkpoint(path) as checkpoint:
        with torch.device("meta"):
            model = Transformer(checkpoint.config, numerics)
        _materialize(model, checkpoint, torch.device(device), dtype)
    return model.eval()


def _materialize(model: Transformer, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
    """Replace every tensor of a model on the meta device by its values, one after the other."""
    declared: dict[str, Tensor] = model.state_dict(keep_vars=True)
    official = {spec.name: spec for spec in tensor_inventory(checkpoint.config, "bf16")}
    if declared.keys() != official.keys():
        raise RuntimeError(f"model and inventory name different tensors: {sorted(declared.keys() ^ official.keys())}")
    scales: dict[str, Tensor] = {}
    for name, spec in official.items():
        value = checkpoint.parameter(name, device)
        matrix = spec.dtype == "BF16" and len(spec.shape) == 2
        wanted = dtype if matrix else declared[name].dtype
        # As Transformer.store_input_major lays weights out, without a second copy of each.
        input_major = matrix and name != "embed.weight"
        values = torch.empty(spec.shape[::-1] if input_major else spec.shape, dtype=wanted, device=device)
        values = (values.t() if input_major else values).copy_(value)
        if spec.dtype == "I64":
            _check_expert_ids(values, checkpoint, name)
        scale = checkpoint.scale(name)
        if scale is not None:
            scales[name] = scale.clone()
        owner, _, leaf = name.rpartition(".")
        if isinstance(declared[name], nn.Parameter):
            values = nn.Parameter(values, requires_grad=False)
        setattr(model.get_submodule(owner), leaf, values)
    setattr(model, LOADED_SCALES, scales)
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if left:
        raise RuntimeError(f"no checkpoint tensor fills {left}")


def _check_expert_ids(table: Tensor, checkpoint: Checkpoint, name: str) -> None:
    experts = checkpoint.config.n_routed_experts
    wrong = table[(table < 0) | (table >= experts)]
    if wrong.numel():
        file, stored = checkpoint.place(name)
        raise CheckpointError(file, f"expert numbers from 0 to {experts - 1}", str(int(wrong[0])), stored)
