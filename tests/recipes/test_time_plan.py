"""The nano recipe's time plan: a budget of seconds becomes a number of steps, which a resumed run keeps."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("reasoning_gym")

sys.path.insert(0, str(Path(__file__).parents[2]))  # recipes/ belongs to the checkout, not to the installed package

from dsv4.training.plan import CALIBRATION_STEPS, REPLAN_EVERY, UNPLANNED, FixedPlan, TimePlan


def drive(plan: TimePlan, steps: int, seconds_per_step: float) -> None:
    for step in range(1, steps + 1):
        plan.observe(step, step * seconds_per_step, freeze=False)


def test_budget_becomes_steps_at_the_measured_speed(tmp_path: Path) -> None:
    plan = TimePlan(tmp_path / "plan.json", seconds=1000.0)
    assert plan.total(0) == UNPLANNED
    drive(plan, CALIBRATION_STEPS, 2.0)
    assert plan.total(CALIBRATION_STEPS) == 500


def test_a_slower_machine_shortens_the_run_until_the_decay_begins(tmp_path: Path) -> None:
    plan = TimePlan(tmp_path / "plan.json", seconds=1000.0)
    drive(plan, CALIBRATION_STEPS, 1.0)
    elapsed = float(CALIBRATION_STEPS)
    for step in range(CALIBRATION_STEPS + 1, REPLAN_EVERY + 1):
        elapsed += 2.0
        plan.observe(step, elapsed, freeze=False)
    mean = (elapsed - 1.0) / (REPLAN_EVERY - 1)  # of all steps but the first: a slow spell alone decides nothing
    assert plan.total(REPLAN_EVERY) == REPLAN_EVERY + int((1000.0 - elapsed) / mean)
    assert plan.total(REPLAN_EVERY) < plan.total(CALIBRATION_STEPS)
    before = plan.total(10 * REPLAN_EVERY)
    plan.observe(2 * REPLAN_EVERY, elapsed + 5000.0, freeze=True)
    assert plan.total(10 * REPLAN_EVERY) == before


def test_a_resumed_run_repeats_the_plans_that_were_made(tmp_path: Path) -> None:
    first = TimePlan(tmp_path / "plan.json", seconds=1000.0)
    drive(first, 2 * REPLAN_EVERY, 2.0)
    again = TimePlan(tmp_path / "plan.json", seconds=1000.0)
    drive(again, 2 * REPLAN_EVERY, 3.0)  # the clock says otherwise now
    assert again.entries == first.entries
    assert [again.total(step) for step in (0, CALIBRATION_STEPS)] == [UNPLANNED, first.total(CALIBRATION_STEPS)]


@pytest.mark.parametrize(
    "calibration, stop", [(2, 1), (4, 1), (4, 3), (CALIBRATION_STEPS, 10), (CALIBRATION_STEPS, 11)]
)
def test_a_run_that_ends_before_its_first_measurement_is_measured_soon(
    calibration: int, stop: int, tmp_path: Path
) -> None:
    drive(TimePlan(tmp_path / "plan.json", seconds=100.0, calibration=calibration), stop, 2.0)
    resumed = TimePlan(tmp_path / "plan.json", seconds=100.0, calibration=calibration)
    step = stop
    while resumed.total(step) == UNPLANNED:
        step += 1
        resumed.observe(step, step * 2.0, freeze=False)
    assert calibration <= step <= max(calibration, stop + 3)
    assert resumed.total(step) == pytest.approx(50, abs=1)
    made = list(resumed.entries)
    resumed.observe(step + 1, step * 2.0 + 100.0, freeze=False)
    assert resumed.entries == made


def test_steps_that_a_rollback_undid_are_spent_but_do_not_slow_the_run(tmp_path: Path) -> None:
    plan = TimePlan(tmp_path / "plan.json", seconds=1000.0)
    elapsed = 0.0
    for step in (*range(1, 291), *range(161, 211), *range(201, 301)):  # back to 160, and to 200 in what came again
        elapsed += 1.0
        plan.observe(step, elapsed, freeze=False)
    assert elapsed == 440.0
    assert plan.total(300) == pytest.approx(1000 - 130 - 10, abs=1)


def test_a_rollback_behind_the_start_of_a_resumed_run_measures_anew(tmp_path: Path) -> None:
    drive(TimePlan(tmp_path / "plan.json", seconds=1000.0), 200, 1.0)
    resumed = TimePlan(tmp_path / "plan.json", seconds=1000.0)
    for elapsed, step in enumerate((*range(201, 291), *range(161, 301)), 201):
        resumed.observe(step, float(elapsed), freeze=False)
    assert resumed.total(300) == pytest.approx(1000 - 130, abs=1)


def test_a_run_without_steps_or_seconds_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0 steps; allowed: 1 or more"):
        FixedPlan(0)
    with pytest.raises(ValueError, match="-1.0 seconds; allowed: more than 0"):
        TimePlan(tmp_path / "plan.json", -1.0)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"steps": 3}', '{"entries": [1, 2]}'])
def test_a_damaged_plan_is_refused_with_its_path(content: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(ValueError, match=r"plan\.json is damaged, or no plan of a run"):
        TimePlan(tmp_path / "plan.json", 1.0)
