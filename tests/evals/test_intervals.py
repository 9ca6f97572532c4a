"""Wilson interval."""

from __future__ import annotations

import pytest

from dsv4.evals.intervals import wilson


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # Values of R's prop.test(correct = FALSE).
    [(8, 10, 0.4902, 0.9433), (0, 20, 0.0, 0.1611), (20, 20, 0.8389, 1.0), (85, 100, 0.7672, 0.9069), (0, 0, 0.0, 1.0)],
)
def test_wilson_intervals_are_the_known_ones(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson(successes, trials) == pytest.approx((low, high), abs=5e-5)


def test_more_successes_than_trials_are_refused() -> None:
    with pytest.raises(ValueError, match="successes is 3"):
        wilson(3, 2)
