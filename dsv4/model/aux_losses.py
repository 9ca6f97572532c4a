"""Side outputs of a training forward: loads, losses of router and indexer, clamped values; and its given choices."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class AuxLosses:
    """Collector of side outputs: pass one to a forward, and the modules add to it.

    routing: experts of each token, int64 [T, k] ascending, by module name ("layers.3.ffn"): layers named there run
    these instead of their router's choice, which rows of -1 leave. The weights of the experts are the router's.
    entries: compressed entries of each token, int64 [T, index_topk] ascending with -1 last (kernels/indexer), by module
    name ("layers.2.attn"): indexers named there have chosen these. A row of -1 leaves the choice to the indexer.
    compare: counts what of `routing` and `entries` this forward would have chosen otherwise, in `expert_differences`
    and `entry_differences`.
    loads: tokens per expert of each score-routed layer, int64 [E], by module name; in an MTP block of those whose next
    token is known (model/moe.py).
    clamps: with count_clamps, by module name of every MoE, int64 [3]: gates and ups that the SwiGLU clamp changed in
    routed and shared experts, and the number of values, gates and ups together.
    csa_layers: number of CSA layers of the whole model, where others than those that report count: in other stages of a
    pipeline, or not adapted; the indexer's loss is then a share of the mean. None: those that report.
    """

    def __init__(
        self,
        routing: Mapping[str, Tensor] | None = None,
        count_clamps: bool = False,
        csa_layers: int | None = None,
        entries: Mapping[str, Tensor] | None = None,
        compare: bool = False,
    ) -> None:
        self.routing, self.count_clamps, self.csa_layers = routing or {}, count_clamps, csa_layers
        self.entries, self.compare = entries or {}, compare
        self.expert_differences, self.entry_differences = 0, 0
        self.clamps: dict[str, Tensor] = {}
        self.loads: dict[str, Tensor] = {}
        self._balance: list[Tensor] = []
        self._indexer: list[Tensor] = []

    def add_routing(self, name: str, load: Tensor, balance_loss: Tensor) -> None:
        self.loads[name] = load
        self._balance.append(balance_loss)

    def add_clamps(self, name: str, counts: Tensor) -> None:
        self.clamps[name] = self.clamps[name] + counts if name in self.clamps else counts

    def add_indexer(self, loss: Tensor) -> None:
        self._indexer.append(loss)

    @property
    def balance_loss(self) -> Tensor:
        """Sum over score-routed layers of their balance losses, each about 1 when even; scalar, 0 without any."""
        return torch.stack(self._balance).sum() if self._balance else torch.zeros(())

    @property
    def indexer_loss(self) -> Tensor:
        """Mean over CSA layers of KL(main attention over entries || indexer), scalar (0 if no layer reported)."""
        if not self._indexer:
            return torch.zeros(())
        losses = torch.stack(self._indexer)
        return losses.mean() if self.csa_layers is None else losses.sum() / self.csa_layers


def count_differences(given: Tensor, own: Tensor) -> int:
    """Numbers of `given` [T, k] that are not in the same row of `own` [T, k]; negative ones are none."""
    own = own.sort(-1).values
    place = torch.searchsorted(own, given.contiguous()).clamp(max=own.shape[1] - 1)
    return int(((own.gather(1, place) != given) & (given >= 0)).sum())
