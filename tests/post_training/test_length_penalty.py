"""Length penalties: values at the edges, and the order of efforts."""

from __future__ import annotations

import pytest

from dsv4.post_training.length_penalty import BudgetPenalty, OverlengthPenalty


def test_a_mode_punishes_only_what_is_near_its_window() -> None:
    penalty = OverlengthPenalty(window=100, free=60, most=0.5)
    assert [penalty.reward(n) for n in (0, 60, 80, 100, 1000)] == [0.0, 0.0, -0.25, -0.5, -0.5]


def test_a_budget_costs_less_the_larger_it_is() -> None:
    penalty = BudgetPenalty(norm=1000.0)
    assert penalty.reward(1000, 1) == -0.5 and penalty.reward(5000, 1) == -0.5
    costs = [penalty.reward(500, budget) for budget in (1, 25, 50, 75, 100)]
    assert costs == sorted(costs) and len(set(costs)) == 5
    assert penalty.reward(1000, 100) == pytest.approx(-0.069, abs=1e-3)


def test_numbers_that_are_not_allowed_are_named() -> None:
    with pytest.raises(ValueError, match="free is 100; allowed: 0 to window - 1, 99"):
        OverlengthPenalty(window=100, free=100)
    with pytest.raises(ValueError, match="budget is 0; allowed: 1 to 100"):
        BudgetPenalty(norm=10.0).reward(5, 0)
    with pytest.raises(ValueError, match=r"tau is 0\.0; allowed: more than 0"):
        BudgetPenalty(norm=10.0, tau=0.0)
