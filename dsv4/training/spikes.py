"""Spike detector: a step whose loss or gradient norm lies far above those of the steps before it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any, Literal

Statistic = Literal["loss", "grad_norm", "either"]

# Standard deviation of normal noise over the median absolute difference of two of its values.
DEVIATIONS = 1.4826 / math.sqrt(2.0)


@dataclass(frozen=True)
class SpikeSettings:
    """Rule of the detector; the report discloses none. docs/training.md has the reasons for these defaults.

    A step is high if its statistic is above level + threshold * spread of earlier steps that were not high. level: the
    median of the last `fewest`. spread: the median absolute difference of successive steps in the last `window`, which
    a trend leaves alone, scaled to a standard deviation, but at least `floor` * level. `patience` high steps in a row
    are a spike; a value that is not finite is one at once.
    """

    statistic: Statistic = "loss"
    window: int = 64
    fewest: int = 16  # steps before the first verdict, and after each change of what is trained on
    threshold: float = 6.0
    floor: float = 0.02
    patience: int = 2

    def __post_init__(self) -> None:
        if self.statistic not in ("loss", "grad_norm", "either"):
            raise ValueError(f"statistic is {self.statistic!r}; allowed: loss, grad_norm, either")
        if self.patience < 1:
            raise ValueError(f"patience is {self.patience}; allowed: 1 or more")
        if not 2 <= self.fewest <= self.window:
            raise ValueError(f"fewest is {self.fewest}; allowed: 2 to window, {self.window}")
        if not self.threshold > 0.0 or not self.floor > 0.0:
            raise ValueError(f"threshold {self.threshold} and floor {self.floor}: both must be more than 0")


@dataclass(frozen=True)
class Spike:
    """A spike seen at `step` that began at `start`, with the value and the limit that it passed at `step`."""

    start: int
    step: int
    statistic: str
    value: float
    limit: float


@dataclass
class SpikeDetector:
    """Watches one step after the other. `state()` is what it knows; one made from it goes on in the same way."""

    settings: SpikeSettings
    phase: list[Any] = field(default_factory=list)
    history: dict[str, list[float]] = field(default_factory=dict)
    high_since: int | None = None

    def observe(self, step: int, phase: list[Any], values: Mapping[str, float]) -> Spike | None:
        """Record the loss and grad_norm of a step; return a spike if this step completes one.

        phase: what the loss depends on besides the weights, such as the stage; a change starts the history again.
        """
        if phase != self.phase:
            self.phase, self.history, self.high_since = phase, {}, None
        names = ("loss", "grad_norm") if self.settings.statistic == "either" else (self.settings.statistic,)
        broken = [name for name in ("loss", "grad_norm") if not math.isfinite(values[name])]
        high = [name for name in names if values[name] > self.limit(name)]
        if broken or high:
            self.high_since = step if self.high_since is None else self.high_since
            if not broken and step - self.high_since + 1 < self.settings.patience:
                return None
            name = (broken or high)[0]
            return Spike(self.high_since, step, name, values[name], self.limit(name))
        self.high_since = None
        for name in names:
            self.history[name] = [*self.history.get(name, []), values[name]][-self.settings.window :]
        return None

    def limit(self, name: str) -> float:
        """Value of a statistic above which a step is high; infinite without enough history."""
        history = self.history.get(name, [])
        if len(history) < self.settings.fewest:
            return math.inf
        level = median(history[-self.settings.fewest :])
        spread = DEVIATIONS * median(abs(after - before) for before, after in pairwise(history))
        return level + self.settings.threshold * max(spread, self.settings.floor * abs(level))

    def state(self) -> dict[str, Any]:
        history = {name: list(values) for name, values in self.history.items()}
        return {"phase": list(self.phase), "history": history, "high_since": self.high_since}
