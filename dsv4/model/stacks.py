"""Tensors of a model by official name: stacked experts as the matrices that checkpoints and native kernels know."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import cast

from torch import Tensor, nn

from dsv4.kernels.stored import matrices_of

_STACK = re.compile(r"^(.*\.experts)\.(w[123])$")


def official_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the module's names -> by official name, in official order; stacks as views of their matrices.

    What has an official name already keeps it.
    """
    official: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stack = _STACK.match(name)
        if stack is None:
            official[name] = tensor
        elif f"{stack[1]}.0.{stack[2]}.weight" not in official:  # once, at the first of the three
            official |= _expert_matrices(stack[1], tensors)
    return official


def _expert_matrices(experts: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Expert by expert, w1, w2 and w3 of each."""
    found = [(w, matrices_of(tensors[f"{experts}.{w}"])) for w in ("w1", "w2", "w3") if f"{experts}.{w}" in tensors]
    most = max(len(matrices) for _, matrices in found)
    return {f"{experts}.{e}.{w}.weight": m[e] for e in range(most) for w, m in found if e < len(m)}


def named_tensors(model: object) -> dict[str, Tensor]:
    """Parameters and tables of a module by its own names; a tensor that two modules share has two names."""
    module = cast(nn.Module, model)
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))


def native_tensors(model: object) -> dict[str, Tensor]:
    """Parameters and tables of a module by official name, as the native kernels ask for them."""
    return official_tensors(named_tensors(model))
