"""Learning rate schedule: linear warm-up, constant, cosine to a fraction of the peak (DeepSeek-V4 report)."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Warm-up, then `peak`; the last `decay_fraction` of the steps follow a cosine to `peak * final_ratio`."""

    peak: float
    warmup_steps: int
    decay_fraction: float = 0.3
    final_ratio: float = 0.1

    def __post_init__(self) -> None:
        if not 0.0 <= self.decay_fraction <= 1.0:
            raise ValueError(f"decay_fraction is {self.decay_fraction}; allowed: 0 to 1")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps is {self.warmup_steps}; allowed: 0 or more")

    def decay_start(self, total_steps: int) -> int:
        """First step of the decay; `total_steps` without one."""
        return total_steps - round(total_steps * self.decay_fraction)

    def rate(self, step: int, total_steps: int) -> float:
        """Learning rate of step `step` (0-based) of `total_steps`; with a decay, the last step has the final rate.

        The warm-up of a run that is shorter than it takes all steps.
        """
        warmup = min(1.0, (step + 1) / min(self.warmup_steps, total_steps)) if self.warmup_steps else 1.0
        start = self.decay_start(total_steps)
        if step < start:
            return self.peak * warmup
        progress = min(1.0, (step - start + 1) / max(1, total_steps - start))
        cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.peak * warmup * (self.final_ratio + (1.0 - self.final_ratio) * cosine)

    def in_decay(self, step: int, total_steps: int) -> bool:
        """True if `step` is in the decay, where the MTP loss weighs 0.1 instead of 0.3."""
        return step >= self.decay_start(total_steps)
