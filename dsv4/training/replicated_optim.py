"""MuonAdamW of adapters over ranks: small enough for every rank to hold them all, and to take every step itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dsv4.model.transformer import Transformer
from dsv4.parallel.sums import sum_gradients, sum_numbers
from dsv4.training.attention_phase import PHASES, AttentionPhase
from dsv4.training.optim import MuonAdamW
from dsv4.training.parts import SAME_LAYERS, Parts


class ReplicatedMuonAdamW:
    """Optimizer with the interface of ShardedMuonAdamW, of parameters that all ranks with the same layers have whole.

    Gradients are added up over these ranks, which then take the same step, to the same bits.
    """

    def __init__(self, model: Transformer, parts: Parts, **settings: Any) -> None:
        self._parts, self._device = parts, model.device
        self._inner = MuonAdamW(model, model.config, **settings)
        self._inner.start_adamw()
        self._muon = {rule.name for rule in self._inner.rules if rule.kind == "muon"}
        self.updates: dict[AttentionPhase, int] = dict.fromkeys(PHASES, 0)

    def collect(self) -> None:
        """Add up the gradients of the ranks that hold the same layers."""
        for group in self._parts.groups():
            sum_gradients(self._inner.parameters.values(), group)

    def gradient_norm(self) -> float:
        """L2 norm of all gradients together; the same bits on every rank."""
        own, pipeline = self._inner.gradient_norm(), self._parts.pipeline
        return own if pipeline is None else sum_numbers([own**2], pipeline.group, self._device)[0] ** 0.5

    def step(self, lr: float, grad_scale: float = 1.0, attention: AttentionPhase = "sparse") -> None:
        """As MuonAdamW.step."""
        self._inner.step(lr, grad_scale, attention=attention)
        self.updates[attention] += 1

    def zero_grad(self) -> None:
        """Drop every gradient."""
        self._inner.zero_grad()

    def not_finite(self) -> list[str]:
        """As in MuonAdamW, of this rank's layers."""
        return self._inner.not_finite()

    def finite(self) -> bool:
        """True if all parameters on all ranks are finite."""
        flag = torch.tensor(int(all(bool(p.isfinite().all()) for p in self._inner.parameters.values())))
        dist.all_reduce(flag, dist.ReduceOp.MIN)
        return bool(flag)

    def state(self, copies: bool = True) -> dict[str, Tensor]:
        """Tensors of the run's state by name, not copied.

        copies: also on ranks other than the first of those that hold the same layers.
        """
        if not copies and any(self._parts.mesh.get_local_rank(name) for name in SAME_LAYERS):
            return {}
        found: dict[str, Tensor] = {}
        for name, parameter in self._inner.parameters.items():
            found[f"model.{name}"] = parameter.detach()
            if name in self._muon:
                found[f"momentum.{name}"] = self._inner.momentum_of(name)
            else:
                found[f"exp_avg.{name}"], found[f"exp_avg_sq.{name}"] = self._inner.moments_of(name)
        return found

    def loaded(self, updates: Mapping[AttentionPhase, int]) -> None:
        """Go on after `state()`'s tensors were read from a checkpoint that was written after these `updates`."""
        self.updates = dict(updates)
        self._inner.start_adamw(self.updates)
