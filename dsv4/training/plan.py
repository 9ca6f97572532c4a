"""How many steps a run makes: given, or what a budget of seconds allows at the measured speed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dsv4.checkpoint.atomic import new_file

CALIBRATION_STEPS = 12
REPLAN_EVERY = 50
# Until the speed is known: long enough that no stage ends and no decay starts before the first plan.
UNPLANNED = 1_000_000


class StepPlan:
    """The total number of steps, as known at each step.

    With a budget the total is measured after CALIBRATION_STEPS steps and again every REPLAN_EVERY steps until `freeze`
    says that the learning rate has begun to decay. Every plan is written to `path` at once, and one that stands there
    is never made again: a run resumed after a kill repeats its steps to the same bits whatever the clock says.
    """

    def __init__(self, path: Path, *, steps: int | None = None, seconds: float | None = None) -> None:
        """Give exactly one of `steps` and `seconds`; a plan found at `path` must be of the same kind."""
        if (steps is None) == (seconds is None):
            raise ValueError(f"a run takes either steps or seconds; got steps={steps}, seconds={seconds}")
        limit = steps if steps is not None else seconds
        if limit is not None and limit <= 0:
            raise ValueError(f"a run needs a positive number of steps or seconds; got {limit}")
        self.path, self.steps, self.seconds = path, steps, seconds
        self.entries: list[tuple[int, int]] = []  # (step at which the plan was made, total steps from there on)
        self._mark: tuple[int, float] | None = None
        if path.exists():
            saved = _read(path)
            if (saved["steps"] is None) != (steps is None) or (steps is not None and saved["steps"] != steps):
                raise ValueError(
                    f"{path} plans steps={saved['steps']}, seconds={saved['seconds']}; "
                    f"the run asks for steps={steps}, seconds={seconds}"
                )
            self.entries = [(int(step), int(total)) for step, total in saved["entries"]]

    def total(self, step: int) -> int:
        """Total steps of the run as planned at or before `step`."""
        if self.steps is not None:
            return self.steps
        return next((total for made, total in reversed(self.entries) if made <= step), UNPLANNED)

    def observe(self, step: int, elapsed: float, freeze: bool) -> None:
        """Tell the plan that `step` steps took `elapsed` seconds so far; it replans when that is due."""
        if self.seconds is None or freeze:
            return
        if self._mark is None:  # the first step allocates and warms up: it does not count for the speed
            if step >= 1:
                self._mark = (step, elapsed)
            return
        since, at = self._mark
        due = step == CALIBRATION_STEPS or (step > CALIBRATION_STEPS and step % REPLAN_EVERY == 0)
        if not due or step <= since or (self.entries and self.entries[-1][0] >= step):
            return
        # The speed of the whole run: on a busy machine fifty steps in a row can be twice too slow or too fast.
        seconds_per_step = (elapsed - at) / (step - since)
        total = step + max(1, int((self.seconds - elapsed) / seconds_per_step))
        self.entries.append((step, total))
        content = {"steps": self.steps, "seconds": self.seconds, "entries": self.entries}
        with new_file(self.path) as temporary:
            temporary.write_text(json.dumps(content), encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    """The content of a plan file; ValueError in words where it is not one."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(saved, dict) or not {"steps", "seconds", "entries"} <= set(saved):
        raise ValueError(f"{path} is no plan of a run: it holds no steps, seconds and entries")
    return saved
