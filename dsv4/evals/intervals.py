"""Confidence intervals of a rate, and of the difference of two."""

from __future__ import annotations

import math

Z95 = 1.959963984540054


def wilson(successes: int, trials: int, z: float = Z95) -> tuple[float, float]:
    """Wilson score interval of `successes` in `trials`; (0, 1) without trials. 95 % by default."""
    if not 0 <= successes <= trials:
        raise ValueError(f"successes is {successes}; allowed: 0 to the number of trials, {trials}")
    if trials == 0:
        return 0.0, 1.0
    rate, squared = successes / trials, z * z
    centre = (rate + squared / (2 * trials)) / (1 + squared / trials)
    half = z * math.sqrt(rate * (1 - rate) / trials + squared / (4 * trials * trials)) / (1 + squared / trials)
    # At 0 and 1 center and half width are equal up to rounding: the bound is exact.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == trials else min(1.0, centre + half)
    return low, high


def difference(first: tuple[int, int], second: tuple[int, int]) -> tuple[float, float]:
    """95 % interval of the first rate minus the second, each (successes, trials), by Newcombe from Wilson intervals."""
    (low1, high1), (low2, high2) = wilson(*first), wilson(*second)
    rate1, rate2 = (successes / trials if trials else 0.5 for successes, trials in (first, second))
    gap = rate1 - rate2
    return gap - math.hypot(rate1 - low1, high2 - rate2), gap + math.hypot(high1 - rate1, rate2 - low2)
