"""Settings of LoRA adapters; needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

AdapterOptimizer = Literal["adamw", "muon"]
DEFAULT_TARGETS = ("attention", "experts", "shared_experts")


@dataclass(frozen=True)
class LoraSettings:
    """Rank of every adapter, `alpha` over rank the factor of its product, and the matrices that have one.

    targets: names of `lora.GROUPS`, "head", or patterns of matrix names with * and ?, such as "layers.3.attn.*".
    """

    rank: int
    alpha: float = 32.0
    targets: tuple[str, ...] = DEFAULT_TARGETS

    @property
    def scale(self) -> float:
        return self.alpha / self.rank
