"""Expert parallelism: each rank of the mesh's `expert` dimension holds an equal part of every layer's routed experts.

A rank's rows arrive sorted by expert, so those for one rank are adjacent: one exchange takes them there, one brings the
results back. An expert's rows stand in the order of the ranks that sent them, so that no bit depends on timing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from dsv4.kernels.stored import StoredStack
from dsv4.model.lora import LoraExperts
from dsv4.model.moe import ClampWatcher, Experts, MoE


class _Exchange(torch.autograd.Function):
    """Rows to other ranks: `sent[i]` to rank i, `received[i]` from it. Its gradient goes the other way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _exchange(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _exchange(grad, ctx.received, ctx.sent, ctx.group), None, None, None


def _exchange(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    out = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
    return out


class ParallelExperts(Experts):
    """This rank's part of a layer's experts, called with the rows for all of them as `Experts` is."""

    def __init__(self, experts: Experts, mesh: DeviceMesh) -> None:
        nn.Module.__init__(self)
        self.group, self.ranks = mesh.get_group(), mesh.size()
        self.limit, self.quantize = experts.limit, experts.quantize
        self.total = experts.w1.shape[0]
        self.count = self.total // self.ranks
        self.first = mesh.get_local_rank() * self.count
        for name, weight in experts.named_parameters(recurse=False):
            setattr(self, name, self._own(weight))

    def _own(self, stack: nn.Parameter) -> nn.Parameter:
        """This rank's part of a stack [E, ...]: a copy, or the stored matrices as they are."""
        last = self.first + self.count
        if isinstance(stack, StoredStack):
            own = StoredStack(stack.matrices[self.first : last])
        else:
            own = stack.detach()[self.first : last].clone()
        return nn.Parameter(own, requires_grad=stack.requires_grad)

    def forward(self, x: Tensor, sizes: list[int], weights: Tensor, watcher: ClampWatcher | None = None) -> Tensor:
        mine = torch.tensor(sizes, device=x.device).view(self.ranks, self.count)
        mine = F.pad(mine, (0, 1), value=int(x.requires_grad))
        theirs = torch.empty_like(mine)
        dist.all_to_all_single(theirs, mine, group=self.group)
        if bool(theirs[:, -1].any()):
            # With few adapters before this layer, rows of short documents may depend on none: all ranks of the group
            # run the exchanges of the backward, or none.
            x, weights = (rows if rows.requires_grad else rows.detach().requires_grad_() for rows in (x, weights))
        mine, theirs = mine[:, :-1], theirs[:, :-1]  # rows for each rank's experts; rows from each rank for each here
        sent, received = mine.sum(1).tolist(), theirs.sum(1).tolist()
        expert = torch.arange(self.count, device=x.device).repeat(self.ranks).repeat_interleave(theirs.flatten())
        order = expert.argsort(stable=True)  # by expert, then by sender, then as sent
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=x.device)
        rows = _Permute.apply(_Exchange.apply(x, sent, received, self.group), order, back)
        scales = _Permute.apply(_Exchange.apply(weights, sent, received, self.group), order, back)
        out = super().forward(rows, theirs.sum(0).tolist(), scales, watcher)
        return _Exchange.apply(_Permute.apply(out, back, order), received, sent, self.group)  # pyright: ignore[reportReturnType]


class ParallelLoraExperts(ParallelExperts, LoraExperts):
    """This rank's part of a layer's experts with adapters, of the base and of the adapters."""

    def __init__(self, experts: LoraExperts, mesh: DeviceMesh) -> None:
        super().__init__(experts, mesh)
        self.scale = experts.scale
        self.lora_A = nn.ParameterDict({name: self._own(stack) for name, stack in experts.lora_A.items()})
        self.lora_B = nn.ParameterDict({name: self._own(stack) for name, stack in experts.lora_B.items()})


class _Permute(torch.autograd.Function):
    """rows[order], whose gradient is grad[back]: a gather too."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.back = back
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad.index_select(0, ctx.back), None, None


def split_experts(model: nn.Module, mesh: DeviceMesh) -> None:
    """Leave to every MoE of `model` this rank's part of its experts; `mesh` is the one of the dimension `expert`."""
    if mesh.size() == 1:
        return
    for module in model.modules():
        if isinstance(module, MoE):
            experts = module.experts
            adapted = isinstance(experts, LoraExperts)
            module.experts = ParallelLoraExperts(experts, mesh) if adapted else ParallelExperts(experts, mesh)
