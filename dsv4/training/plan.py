"""How many steps a run makes: the loop asks its plan before each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

UNPLANNED = 1_000_000  # total of a plan that does not know yet: no stage ends and no decay starts before


class Plan(Protocol):
    """A length may follow from measured speed; a resumed run has to get the totals of its first one."""

    def total(self, step: int) -> int:
        """Total steps of the run as planned at or before `step`."""
        ...

    def observe(self, step: int, elapsed: float, freeze: bool) -> None:
        """`step` steps took `elapsed` seconds so far. freeze: the learning rate decays, so the total stays."""
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
