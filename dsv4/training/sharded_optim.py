"""MuonAdamW over ranks: each rank steps whole matrices of its own, its experts, and its part of AdamW's parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from dsv4.model.parameters import row_of
from dsv4.model.transformer import Transformer
from dsv4.parallel.fsdp import first_row, local_part
from dsv4.parallel.mesh import dense_mesh
from dsv4.parallel.sums import names_on_any
from dsv4.parallel.zero import Matrix, WholeMatrices, assign_owners, newton_schulz_cost
from dsv4.training.attention_phase import AttentionPhase
from dsv4.training.optim import MuonAdamW, parameter_rule
from dsv4.training.rank_optim import RankOptimizer


class _Named(nn.Module):
    """Parameters by dotted names."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self._named = parameters

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return iter(self._named.items())


class ShardedMuonAdamW(RankOptimizer):
    """Optimizer of a model that shard_model has sharded: a MuonAdamW of the tensors that this rank steps.

    Of a dense matrix that is the owner's whole float32 copy, the master, whose rows the ranks' parts are; all other
    tensors are the parts themselves.
    """

    def __init__(
        self, model: Transformer, mesh: DeviceMesh, copies: frozenset[str] = frozenset(), **settings: Any
    ) -> None:
        """copies: parameters that another stage of the pipeline has too, with the same gradient, and accounts for."""
        self._copies, self._device = copies, model.device
        dense = dense_mesh(mesh)
        self._same_layers = dense.get_group()
        self._sharded = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._muon = [name for name in self._sharded if row_of(name).optimizer == "muon" and ".experts." not in name]
        costs: dict[str, int] = {}
        for name in self._muon:
            shape = tuple(self._sharded[name].shape)
            costs[name] = newton_schulz_cost(parameter_rule(name, shape, model.config).matrices)
        owners = assign_owners(costs, dense.size())
        shapes = {name: self._sharded[name].shape for name in self._muon}
        self._whole = WholeMatrices(
            [Matrix(name, shapes[name][0], shapes[name][1], owners[name]) for name in self._muon], self._same_layers
        )
        self._first_expert = mesh.get_local_rank("expert")
        self._fixed = {name: p for name, p in model.named_parameters() if not p.requires_grad} | dict(
            model.named_buffers()
        )
        parts = {name: local_part(p) for name, p in self._sharded.items()}
        self._parts = {name: parts[name] for name in self._muon}
        self._masters = self._whole.to_owners(self._parts)
        own = {name: part for name, part in parts.items() if name not in self._parts and part.numel()} | self._masters
        super().__init__(MuonAdamW(_Named({n: nn.Parameter(t) for n, t in own.items()}), model.config, **settings))
        self._own = self._inner.parameters
        self._adamw = [n for n in self._sharded if row_of(n).optimizer != "muon"]

    def collect(self) -> None:
        """Bring the gradients that the backward left in parts to the tensors that this rank steps."""
        gradients = {
            name: local_part(p.grad) if p.grad is not None else torch.zeros_like(local_part(p))
            for name, p in self._sharded.items()
        }
        gradients |= self._whole.to_owners({name: gradients[name] for name in self._muon})
        for name, parameter in self._own.items():
            parameter.grad = gradients[name]

    def gradient_norm(self) -> float:
        """L2 norm of all gradients together; the same bits on every rank."""
        square = self._inner.gradient_norm() ** 2
        copied = (self._own[name].grad for name in self._copies if name in self._own)
        square -= sum(float(grad.norm()) ** 2 for grad in copied if grad is not None)
        own = torch.tensor(square, dtype=torch.float64).clamp(min=0.0)  # NaN stays, for which max() has no order
        every = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(every, own)
        return float(torch.stack(every).sum().sqrt())

    def _reached(self) -> set[str]:
        # A rank may have rows of zeros of a parameter that others have a gradient of.
        return names_on_any(self._adamw, self._inner.reached_by_adamw(), self._same_layers, self._device)

    def step(self, lr: float, grad_scale: float = 1.0, attention: AttentionPhase = "sparse") -> None:
        """As MuonAdamW.step, on every rank's part."""
        super().step(lr, grad_scale, attention)
        self._give_back()

    def _give_back(self) -> None:
        self._whole.from_owners({name: self._own[name].detach() for name in self._masters}, self._parts)

    def zero_grad(self) -> None:
        """Drop every gradient."""
        super().zero_grad()
        for parameter in self._sharded.values():
            parameter.grad = None

    def state(self, copies: bool = True) -> dict[str, Tensor]:
        """This rank's tensors of the run's state by name, not copied: whole matrices, or parts with their place.

        copies: with those that another rank, of another stage of the pipeline, has too.
        """
        found: dict[str, Tensor] = {f"model.{name}": tensor.detach() for name, tensor in self._fixed.items()}
        for name, own in self._own.items():
            if row_of(name).optimizer == "muon":
                momentum = self._inner.momentum_of(name)
                if ".experts." in name:
                    first = self._expert_offset(name)
                    for number, (weight, move) in enumerate(zip(own.detach(), momentum, strict=True), first):
                        found[f"model.{name}.{number}"], found[f"momentum.{name}.{number}"] = weight, move
                else:
                    found[f"model.{name}"], found[f"momentum.{name}"] = own.detach(), momentum
        for name, parameter in self._sharded.items():
            if row_of(name).optimizer != "muon" and (copies or name not in self._copies):
                local = local_part(parameter)
                moments = self._inner.moments_of(name) if name in self._own else (local, local)
                for key, part in zip(("model", "exp_avg", "exp_avg_sq"), (local, *moments), strict=True):
                    found[f"{key}.{name}"] = _place_like(part, parameter)
        return found

    def _expert_offset(self, name: str) -> int:
        """Number in its layer of the first expert that this rank steps."""
        parameter = self._sharded[name]
        return self._first_expert * parameter.shape[0] + first_row(parameter)

    def loaded(self, updates: Mapping[AttentionPhase, int]) -> None:
        """Go on after `state()`'s tensors were read from a checkpoint that was written after these `updates`."""
        super().loaded(updates)
        self._give_back()


def _place_like(part: Tensor, parameter: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return part
    return DTensor.from_local(
        part, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    )
