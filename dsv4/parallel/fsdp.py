"""FSDP2 around the model's blocks: each rank keeps a part of every parameter, and of its gradient, in float32.

A block's parameters are gathered before its forward and again before its backward. Those outside the blocks, the MTP
blocks' among them, form the root's group and stay gathered from forward to backward: the read-out uses them from
outside of their modules. Gradients are summed, not averaged, since the losses are shares of the whole step's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from dsv4.model.moe import MoE
from dsv4.model.transformer import Transformer
from dsv4.parallel.mesh import dense_mesh, expert_shard_mesh


def shard_model(model: Transformer, mesh: DeviceMesh, keep_gathered: bool = False) -> None:
    """Shard the parameters of `model` in place, experts (after split_experts) over the ranks that hold the same.

    keep_gathered: from a block's forward to its backward, which saves a second gather and takes the whole model's
    memory during a step.
    """
    dense, experts = dense_mesh(mesh), expert_shard_mesh(mesh)
    moved = {p for name, p in model.named_parameters() if name.endswith("gate.bias")}  # by rule, the same everywhere
    for module in list(model.modules()):
        if isinstance(module, MoE):
            fully_shard(module.experts, mesh=experts, reshard_after_forward=not keep_gathered)
    own = [layer for layer in model.layers if next(layer.parameters(), None) is not None]  # of a pipeline's stage
    for layer in own:
        _touch_parameters(layer, layer)
        fully_shard(layer, mesh=dense, ignored_params=moved, reshard_after_forward=not keep_gathered)
    # A later stage of a pipeline has no embedding, or for its MTP block alone.
    module = model.embed if own[0] is model.layers[0] else own[-1]
    _touch_parameters(module, model, {id(p) for layer in own for p in layer.parameters()})
    fully_shard(model, mesh=dense, ignored_params=moved, reshard_after_forward=False)
    for method in ("forward_ragged", "run_stage"):
        register_fsdp_forward_method(model, method)
    for module in sharded_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def sharded_modules(model: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def gathered_as(model: nn.Module, change: Callable[[str, Tensor], None]) -> list[RemovableHandle]:
    """Gather the root's group of a sharded model, and let its blocks compute with changed parameters.

    change(name, whole parameter) changes a block's parameters in place each time the block has gathered them, before
    forward and backward; done twice it must change nothing more. The ranks' parts stay as they are. Ends with the
    hooks that are returned; none for a model that is not sharded.
    """
    root: Any = model
    if not isinstance(root, FSDPModule):
        return []
    root.unshard()
    groups: dict[str, list[str]] = {path: [] for path, m in model.named_modules() if path and isinstance(m, FSDPModule)}
    for name, parameter in model.named_parameters():
        owner = max((path for path in groups if name.startswith(f"{path}.")), key=len, default=None)
        if owner is not None and isinstance(parameter, DTensor):
            groups[owner].append(name)
    hooks = (_change_gathered(model.get_submodule(path), model, names, change) for path, names in groups.items())
    return [hook for both in hooks for hook in both]


def _change_gathered(
    module: nn.Module, model: nn.Module, names: list[str], change: Callable[[str, Tensor], None]
) -> Iterator[RemovableHandle]:
    def apply(*_: object) -> None:
        for name in names:
            change(name, model.get_parameter(name).data)  # autograd sees no write: a later gather undoes it

    def before_backward(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if output.grad_fn is not None:
            output.grad_fn.register_prehook(apply)  # FSDP's, a hook of the tensor, comes before

    yield module.register_forward_pre_hook(apply)  # FSDP's comes before
    yield module.register_forward_hook(before_backward, prepend=True)  # on what the module itself returns


def release_all(model: nn.Module) -> None:
    """Keep this rank's parts alone again, after a forward without a backward: the next one gathers what is then new."""
    for module in sharded_modules(model):
        module.reshard()


def local_part(parameter: Tensor) -> Tensor:
    """This rank's part of a sharded parameter, or the parameter itself; not copied."""
    return cast(DTensor, parameter)._local_tensor if isinstance(parameter, DTensor) else parameter.detach()


def first_row(parameter: Tensor) -> int:
    """Index, along the first dimension of a sharded parameter, at which this rank's part of it begins."""
    if not isinstance(parameter, DTensor):
        return 0
    mesh, rows = parameter.device_mesh, parameter.shape[0]
    return min(rows, mesh.get_local_rank() * -(-rows // mesh.size()))


class _Touch(torch.autograd.Function):
    """x, and a gradient of zero for every parameter: ranks must agree on the parameters that they reduce."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.shapes = [(p.shape, p.dtype) for p in parameters]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad, *(torch.zeros(shape, dtype=dtype, device=grad.device) for shape, dtype in ctx.shapes)


def _touch_parameters(module: nn.Module, owner: nn.Module, without: set[int] | None = None) -> None:
    """Give all parameters in `owner`'s group, experts apart, a gradient in each backward through `module`'s input."""
    skipped = without or set()
    named = [(n, p) for n, p in owner.named_parameters() if p.requires_grad and ".experts." not in n]
    names = [name for name, parameter in named if id(parameter) not in skipped]
    lookup: Callable[[str], Tensor] = owner.get_parameter  # by name: FSDP exchanges the parameters of a module

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return _Touch.apply(inputs[0], *(lookup(name) for name in names)), *inputs[1:]

    def after(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return cast(Tensor, _Touch.apply(output, *(lookup(name) for name in names)))

    if module is owner:
        module.register_forward_pre_hook(before)
    else:
        module.register_forward_hook(after)
