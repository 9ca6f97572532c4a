"""What a measured model gives: its rows, and what all of them share."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.comparison.process import WorkerProcess
from benchmarks.comparison.rows import Row
from benchmarks.engines.plan import IN_TURNS
from dsv4.analysis.parameters import count_parameters
from dsv4.config import ModelConfig


@dataclass
class Outcome:
    """`failures`: contender, measure and last words of what was tried and did not end."""

    model: str
    config: ModelConfig
    rows: list[Row]
    ceilings: dict[str, float]
    settings: dict[str, Any]
    deviation: float | None = None  # of the logits; None where nobody else computes them
    failures: list[str] = field(default_factory=list[str])

    def common(self) -> dict[str, Any]:
        """What every row of this model says."""
        return {
            "model": self.model,
            "parameters": count_parameters(self.config).total,
            "shape": self.config.to_dict(),
            "dtype": "FP4 experts, FP8 linears",
            "settings": self.settings,
            "ceilings": self.ceilings,
            "logits_deviation": self.deviation,
            "failures": self.failures,
        }


class Ceilings:
    """The best of what the machine was seen to do, in a process without dsv4's MKL settings."""

    def __init__(self, worker: WorkerProcess, sizes: dict[str, int]) -> None:
        self._worker, self._sizes = worker, sizes
        self._seen: defaultdict[str, list[float]] = defaultdict(list)

    def measure(self) -> None:
        for name, value in self._worker.ask("ceilings", **self._sizes).items():
            self._seen[name].append(value)

    def best(self) -> dict[str, float]:
        return {name: max(values) for name, values in self._seen.items()}


def in_order(rows: Iterable[Row]) -> list[Row]:
    """Decode, prefill, memory; short before long."""
    order = {"decode": 0, IN_TURNS: 0, "prefill": 1, "peak memory": 3}
    return sorted(rows, key=lambda row: (order.get(row.measure, 2), row.measure, row.tokens, row.peer))
