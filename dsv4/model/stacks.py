"""Tensors of a model by official name, with stacked experts split into the matrices of checkpoints and kernels."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import cast

from torch import Tensor, nn

from dsv4.kernels.stored import StoredStack, StoredTensor, matrices_of

_STACK = re.compile(r"^(.*\.experts)\.(w[123])$")


def official_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the module's names -> by official name, in official order; stacks become views of their matrices.

    Official names are kept.
    """
    official: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stack = _STACK.match(name)
        if stack is None:
            official[name] = tensor
        elif f"{stack[1]}.0.{stack[2]}.weight" not in official:  # once, at the first of w1, w2, w3
            official |= _expert_matrices(stack[1], tensors)
    return official


def _expert_matrices(experts: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Matrices w1, w2 and w3 of each expert in turn, by official name."""
    found = [(w, matrices_of(tensors[f"{experts}.{w}"])) for w in ("w1", "w2", "w3") if f"{experts}.{w}" in tensors]
    most = max(len(matrices) for _, matrices in found)
    return {f"{experts}.{e}.{w}.weight": m[e] for e in range(most) for w, m in found if e < len(m)}


def named_tensors(model: object) -> dict[str, Tensor]:
    """Parameters and tables of a module by its own names; a tensor shared by two modules appears under both."""
    module = cast(nn.Module, model)
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))


def native_tensors(model: object) -> dict[str, Tensor]:
    """Parameters and tables of a module by official name, as the native kernels expect them."""
    return official_tensors(named_tensors(model))


def has_stored_experts(model: object) -> bool:
    """True if every routed expert of a module stays as it is stored."""
    stacks = [tensor for name, tensor in named_tensors(model).items() if _STACK.match(name)]
    return all(
        isinstance(stack, StoredStack) and all(isinstance(matrix, StoredTensor) for matrix in stack.matrices)
        for stack in stacks
    )
