"""Interleaved sampling for all benchmarks, and a result's line in the terminal."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from statistics import median
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)


def in_turns(takes: Mapping[Key, Callable[[int], float | None]], rounds: int) -> dict[Key, list[float]]:
    """Samples of each figure: round by round, each round taking all figures, every second round in reverse order.

    So other load on the machine affects all figures alike. A take gets the round's number; None is no sample.
    """
    samples: dict[Key, list[float]] = {key: [] for key in takes}
    for number in range(rounds):
        for key in list(takes)[:: -1 if number % 2 else 1]:
            sample = takes[key](number)
            if sample is not None:
                samples[key].append(sample)
    return samples


def line(name: str, samples: Sequence[float], unit: str) -> str:
    """Format as "name: median unit (number of samples, smallest to largest)"."""
    low, middle, high = (f"{value:.4g}" for value in (min(samples), median(samples), max(samples)))
    return f"{name}: {middle} {unit}" + (f" (median of {len(samples)}, {low} to {high})" if len(samples) > 1 else "")
