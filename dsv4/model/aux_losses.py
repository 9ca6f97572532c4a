"""Side outputs of a training forward: expert loads, the balance loss, the indexer's loss."""

from __future__ import annotations

import torch
from torch import Tensor


class AuxLosses:
    """Collector of side outputs: pass one to a forward, and the modules add to it.

    loads: tokens per expert of each score-routed layer, int64 [E], by module name ("layers.3.ffn").
    """

    def __init__(self) -> None:
        self.loads: dict[str, Tensor] = {}
        self._balance: list[Tensor] = []
        self._indexer: list[Tensor] = []

    def add_routing(self, name: str, load: Tensor, balance_loss: Tensor) -> None:
        self.loads[name] = load
        self._balance.append(balance_loss)

    def add_indexer(self, loss: Tensor) -> None:
        self._indexer.append(loss)

    @property
    def balance_loss(self) -> Tensor:
        """Mean over score-routed layers of the sequence-wise balance loss, scalar (0 if no layer reported)."""
        return torch.stack(self._balance).mean() if self._balance else torch.zeros(())

    @property
    def indexer_loss(self) -> Tensor:
        """Mean over CSA layers of KL(main attention over entries || indexer), scalar (0 if no layer reported)."""
        return torch.stack(self._indexer).mean() if self._indexer else torch.zeros(())
