"""Learning-rate schedule."""

from __future__ import annotations

import itertools

import pytest

from dsv4.training.schedule import Schedule


def test_rate_warms_up_stays_and_falls_by_a_cosine() -> None:
    schedule = Schedule(peak=2.0, warmup_steps=4, decay_fraction=0.25, final_ratio=0.1)
    rates = [schedule.rate(step, 40) for step in range(40)]
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert rates[4:30] == [2.0] * 26
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[29:]))
    assert rates[34] == pytest.approx((2.0 + 0.2) / 2)  # half way down the cosine
    assert rates[-1] == pytest.approx(0.2)


def test_decay_starts_where_the_mtp_weight_changes() -> None:
    schedule = Schedule(peak=1.0, warmup_steps=0, decay_fraction=0.3)
    assert [schedule.in_decay(step, 10) for step in (6, 7)] == [False, True]
    assert schedule.rate(6, 10) == 1.0
    assert schedule.rate(7, 10) < 1.0


def test_a_run_shorter_than_its_warm_up_reaches_the_peak() -> None:
    schedule = Schedule(peak=1.0, warmup_steps=40, decay_fraction=0.0)
    assert [schedule.rate(step, 4) for step in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])


@pytest.mark.parametrize("fraction", [-0.1, 1.5])
def test_an_invalid_fraction_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="decay_fraction"):
        Schedule(peak=1.0, warmup_steps=0, decay_fraction=fraction)
