"""Step plan: from a budget of seconds to a number of steps that a resumed run keeps."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsv4.training.plan import CALIBRATION_STEPS, REPLAN_EVERY, UNPLANNED, StepPlan


def drive(plan: StepPlan, steps: int, seconds_per_step: float, freeze_from: int = UNPLANNED) -> None:
    for step in range(1, steps + 1):
        plan.observe(step, step * seconds_per_step, freeze=step >= freeze_from)


def test_budget_becomes_steps_at_the_measured_speed(tmp_path: Path) -> None:
    plan = StepPlan(tmp_path / "plan.json", seconds=1000.0)
    assert plan.total(0) == UNPLANNED
    drive(plan, CALIBRATION_STEPS, 2.0)
    assert plan.total(CALIBRATION_STEPS) == 500


def test_a_slower_machine_shortens_the_run_until_the_decay_begins(tmp_path: Path) -> None:
    plan = StepPlan(tmp_path / "plan.json", seconds=1000.0)
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
    first = StepPlan(tmp_path / "plan.json", seconds=1000.0)
    drive(first, 2 * REPLAN_EVERY, 2.0)
    again = StepPlan(tmp_path / "plan.json", seconds=1000.0)
    drive(again, 2 * REPLAN_EVERY, 3.0)  # the clock says otherwise now
    assert again.entries == first.entries
    assert [again.total(step) for step in (0, CALIBRATION_STEPS)] == [UNPLANNED, first.total(CALIBRATION_STEPS)]


@pytest.mark.parametrize(("steps", "seconds"), [(None, None), (3, 4.0), (0, None), (None, -1.0)])
def test_senseless_lengths_are_refused(tmp_path: Path, steps: int | None, seconds: float | None) -> None:
    with pytest.raises(ValueError, match="steps"):
        StepPlan(tmp_path / "plan.json", steps=steps, seconds=seconds)


def test_another_kind_of_plan_in_the_folder_is_refused(tmp_path: Path) -> None:
    drive(StepPlan(tmp_path / "plan.json", seconds=100.0), CALIBRATION_STEPS, 1.0)
    with pytest.raises(ValueError, match=r"plan\.json plans steps=None, seconds=100\.0"):
        StepPlan(tmp_path / "plan.json", steps=10)
