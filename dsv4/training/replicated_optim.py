"""MuonAdamW of adapters over ranks: a rank steps all that it holds, small enough not to be divided any further."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from dsv4.model.transformer import Transformer
from dsv4.parallel.sums import names_on_any, sum_gradients, sum_numbers
from dsv4.training.optim import MuonAdamW
from dsv4.training.parts import SAME_EXPERTS, SAME_LAYERS, Parts
from dsv4.training.rank_optim import RankOptimizer


class ReplicatedMuonAdamW(RankOptimizer):
    """Optimizer of parameters that all ranks with the same layers have whole.

    Of routed experts divided over ranks, those with the same experts have the same adapters. Gradients are added up
    over the ranks that have a parameter, which then take the same step, to the same bits.
    """

    def __init__(self, model: Transformer, parts: Parts, **settings: Any) -> None:
        self._parts, self._device = parts, model.device
        super().__init__(MuonAdamW(model, model.config, **settings))
        self._muon = {rule.name for rule in self._inner.rules if rule.kind == "muon"}
        experts = parts.mesh["expert"].size()
        self._divided = {name for name in self._inner.parameters if experts > 1 and ".experts." in name}
        self._whole = self._inner.parameters.keys() - self._divided

    def collect(self) -> None:
        """Add up the gradients of the ranks that hold the same layers; of divided experts, the same experts."""
        for names, dimensions in ((self._whole, SAME_LAYERS), (self._divided, SAME_EXPERTS)):
            for group in self._parts.groups(dimensions):
                sum_gradients((p for name, p in self._inner.parameters.items() if name in names), group)

    def gradient_norm(self) -> float:
        """L2 norm of all gradients together; the same bits on every rank."""
        own, pipeline = self._inner.gradient_norm(self._whole), self._parts.pipeline
        if self._divided:
            part = self._inner.gradient_norm(self._divided) ** 2
            group = self._parts.mesh.get_group("expert")
            own = (own**2 + sum_numbers([part], group, self._device)[0]) ** 0.5
        return own if pipeline is None else sum_numbers([own**2], pipeline.group, self._device)[0] ** 0.5

    def _reached(self) -> set[str]:
        own = self._inner.reached_by_adamw()
        if not self._divided:
            return own
        names = [name for name in self._inner.parameters if name not in self._muon]
        return names_on_any(names, own, self._parts.mesh.get_group("expert"), self._device)

    def state(self, copies: bool = True) -> dict[str, Tensor]:
        """Tensors of the run's state by name, not copied; divided ones with their place in the whole.

        copies: also on ranks other than the first of those that have a tensor.
        """
        found: dict[str, Tensor] = {}
        for name, parameter in self._inner.parameters.items():
            divided = name in self._divided
            same = SAME_EXPERTS if divided else SAME_LAYERS
            if not copies and any(self._parts.mesh.get_local_rank(dimension) for dimension in same):
                continue
            tensors = {"model": parameter.detach()}
            if name in self._muon:
                tensors["momentum"] = self._inner.momentum_of(name)
            else:
                tensors["exp_avg"], tensors["exp_avg_sq"] = self._inner.moments_of(name)
            found |= {f"{kind}.{name}": self._place(own) if divided else own for kind, own in tensors.items()}
        return found

    def _place(self, own: Tensor) -> Tensor:
        """A stack [E, ...] of which this rank has the part `own`, its experts'."""
        return DTensor.from_local(own, self._parts.mesh["expert"], [Shard(0)], run_check=False)
