"""Base of the optimizers over ranks: a MuonAdamW of the parameters that this rank steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Set

from torch import Tensor

from dsv4.parallel.sums import all_finite
from dsv4.training.attention_phase import PHASES, AttentionPhase
from dsv4.training.optim import MuonAdamW


class RankOptimizer(ABC):
    """Optimizer of a model over ranks. Every method is called by all ranks together.

    updates: those done, by phase.
    """

    def __init__(self, inner: MuonAdamW) -> None:
        self._inner = inner
        inner.start_adamw()
        self.updates: dict[AttentionPhase, int] = dict.fromkeys(PHASES, 0)

    @abstractmethod
    def collect(self) -> None:
        """Bring the step's gradients to the ranks that step their parameters."""

    @abstractmethod
    def gradient_norm(self) -> float:
        """L2 norm of all gradients together; the same bits on every rank."""

    @abstractmethod
    def state(self, copies: bool = True) -> dict[str, Tensor]:
        """This rank's tensors of the run's state by name, not copied: whole ones, or parts with their place.

        copies: with those that another rank writes too.
        """

    @abstractmethod
    def _reached(self) -> Set[str]:
        """Names of AdamW's parameters with a gradient on any rank that has a part of them."""

    def step(self, lr: float, grad_scale: float = 1.0, attention: AttentionPhase = "sparse") -> None:
        """As MuonAdamW.step, on every rank's part."""
        self._inner.step(lr, grad_scale, attention=attention, reached=self._reached())
        self.updates[attention] += 1

    def zero_grad(self) -> None:
        """Drop every gradient."""
        self._inner.zero_grad()

    def not_finite(self) -> list[str]:
        """As in MuonAdamW, of this rank's gradients."""
        return self._inner.not_finite()

    def finite(self) -> bool:
        """True if all parameters on all ranks are finite."""
        return all_finite(self._inner.parameters.values())

    def loaded(self, updates: Mapping[AttentionPhase, int]) -> None:
        """Go on after `state()`'s tensors were read from a checkpoint that was written after these `updates`."""
        self.updates = dict(updates)
        self._inner.start_adamw(self.updates)
