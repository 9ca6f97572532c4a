"""Plans: the total number of steps of a run, which the loop asks for before each step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

UNPLANNED = 1_000_000  # total while a plan is still undecided; far enough that no stage ends and no decay starts


class Plan(Protocol):
    """Total steps of a run, possibly from measured speed. A resumed run must get the totals that it got before."""

    def total(self, step: int) -> int:
        """Total steps of the run as planned at or before `step`."""
        ...

    def observe(self, step: int, elapsed: float, freeze: bool) -> None:
        """Record that `step` steps took `elapsed` seconds. freeze: the rate decays, so the total must not change."""
        ...


@dataclass(frozen=True)
class FixedPlan:
    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"a run of {self.steps} steps; allowed: 1 or more")

    def total(self, step: int) -> int:
        return self.steps

    def observe(self, step: int, elapsed: float, freeze: bool) -> None:
        pass
