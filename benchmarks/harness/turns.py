"""Interleaved sampling for all benchmarks, their common flags, and a result's line in the terminal."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TypeVar

from benchmarks.harness.process import ROOT

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


def at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: at least 1")
    return int(text)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Flags of every recorded benchmark."""
    add = parser.add_argument
    add("--rounds", type=at_least_one, metavar="N", help="default: 3")
    add("--threads", type=at_least_one, default=2, metavar="N", help="of each; default: %(default)s")
    add("--scratch", type=Path, metavar="DIR", help="keep weights there; default: a temporary folder")
    add("--quick", action="store_true", help="tiny shapes, short prompts: does it run?")
    add("--no-gate", action="store_true", help="do not run the frozen tests; the rows say so")
    add("--results", type=Path, default=ROOT / "benchmarks" / "results", help="default: %(default)s")
