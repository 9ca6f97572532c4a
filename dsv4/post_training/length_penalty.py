"""Length penalties of reinforcement learning: the two forms in which efforts are trained."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dsv4.tokenizer.effort_number import MIN_BUDGET, check_budget


@dataclass(frozen=True)
class OverlengthPenalty:
    """Penalty of an effort mode: 0 up to `free` tokens, then linear, `most` at `window` tokens and beyond.

    Modes differ in window and penalty (report, Reasoning Efforts); its form is not disclosed. This one leaves short
    answers alone, so that a mode's length is bounded by its window and not pressed towards 0.
    """

    window: int
    free: int
    most: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.free < self.window:
            raise ValueError(f"free is {self.free}; allowed: 0 to window - 1, {self.window - 1}")
        if not 0.0 <= self.most < math.inf:
            raise ValueError(f"most is {self.most}; allowed: 0 or more, a finite number")

    def reward(self, tokens: int) -> float:
        """Reward, 0 or less, of an answer of `tokens` tokens, thinking included."""
        return -self.most * min(1.0, max(0.0, (tokens - self.free) / (self.window - self.free)))


@dataclass(frozen=True)
class BudgetPenalty:
    """V4.1's penalty for a scalar budget b: -min(cap, k(b) tokens / norm), k(b) = k0 exp(-(b - 1) / tau).

    Its constants are not disclosed; the defaults make an answer of `norm` tokens cost 0.5 at b = 1 and 0.07 at b = 100.
    """

    norm: float
    k0: float = 0.5
    tau: float = 50.0
    cap: float = 0.5

    def __post_init__(self) -> None:
        for name in ("norm", "k0", "tau", "cap"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: more than 0, a finite number")

    def reward(self, tokens: int, budget: int) -> float:
        """Reward, 0 or less, of an answer of `tokens` tokens under a budget of 1 to 100."""
        return -min(self.cap, self.k0 * math.exp(-(check_budget(budget) - MIN_BUDGET) / self.tau) * tokens / self.norm)
