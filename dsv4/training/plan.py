"""Plans: the total number of steps of a run, which the loop asks for before each step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dsv4.checkpoint.atomic import new_file

UNPLANNED = 1_000_000  # total while a plan is still undecided; far enough that no stage ends and no decay starts

CALIBRATION_STEPS = 12
REPLAN_EVERY = 50  # steps
SETTLED = 2  # steps, after the first, of a process that measures late


class Plan(Protocol):
    """Total steps of a run, possibly from measured speed. A resumed run must get the totals that it got before."""

    def total(self, step: int) -> int:
        """Total steps of the run as planned at or before `step`."""
        ...

    def observe(self, step: int, elapsed: float, freeze: bool) -> None:
        """Record that `step` steps took `elapsed` seconds. freeze: the rate decays, so the total must not change."""
        ...


@dataclass(frozen=True)
class FixedPlan:
    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"a run of {self.steps} steps; allowed: 1 or more")

    def total(self, step: int) -> int:
        return self.steps

    def observe(self, step: int, elapsed: float, freeze: bool) -> None:
        pass


class TimePlan:
    """Plan with a budget of `seconds`: total steps from the measured speed.

    `costs` are (share of the steps, relative cost of a step) of the run's stages: the time left counts the steps of
    later stages at their own cost. The speed is measured after `calibration` steps and again every REPLAN_EVERY
    steps until the learning rate decays; in a run resumed without a measurement, behind SETTLED steps of its own. What
    a rollback undid is spent from the budget, but no part of the speed. Every total is written to `path` at once and
    never recomputed, so that a resumed run repeats its steps to the same bits.
    `calibration`: steps before the first measurement, 2 or more.
    """

    def __init__(
        self,
        path: Path,
        seconds: float,
        costs: Sequence[tuple[float, float]] = ((1.0, 1.0),),
        calibration: int = CALIBRATION_STEPS,
    ) -> None:
        if not seconds > 0:
            raise ValueError(f"a run of {seconds} seconds; allowed: more than 0")
        self.path, self.seconds, self._costs, self._calibration = path, seconds, tuple(costs), calibration
        # (step of the measurement, total steps of the run from then on)
        self.entries: list[tuple[int, int]] = _read_plan(path) if path.exists() else []
        self._times: dict[int, float] = {}  # by step of this process, in order: elapsed, without what was undone
        self._undone = 0.0

    def total(self, step: int) -> int:
        return next((total for made, total in reversed(self.entries) if made <= step), UNPLANNED)

    def observe(self, step: int, elapsed: float, freeze: bool) -> None:
        if step < 1:
            return
        self._note(step, elapsed)
        if freeze and self.entries:  # without a plan yet, a rate that decays from the first step is still unplanned
            return
        since, at = next(iter(self._times.items()))  # the first step allocates and warms up: no part of the speed
        first = self._calibration
        due = step == first or (step > first and step % REPLAN_EVERY == 0)
        # A process that ended just before the first measurement took the mark with it.
        late = not self.entries and step >= first and step - since >= SETTLED
        if not (due or late) or step <= since or (self.entries and self.entries[-1][0] >= step):
            return
        seconds_per_step = (self._times[step] - at) / (step - since)
        self.entries.append((step, self._find_total(step, elapsed, seconds_per_step, since)))
        with new_file(self.path) as temporary:
            temporary.write_text(json.dumps({"steps": None, "seconds": self.seconds, "entries": self.entries}), "utf-8")

    def _note(self, step: int, elapsed: float) -> None:
        if step in self._times:  # again, after a rollback
            self._undone = elapsed - self._times[step]
            self._times = {earlier: at for earlier, at in self._times.items() if earlier <= step}
        elif self._times and step < next(reversed(self._times)):  # before the first step of this process
            self._times, self._undone = {}, 0.0
        self._times[step] = elapsed - self._undone

    def _find_total(self, step: int, elapsed: float, seconds_per_step: float, since: int) -> int:
        """Largest total, more than `step`, that ends within the budget.

        The speed is the mean over the whole run: on a busy machine fifty consecutive steps can be off by a factor of
        two.
        """
        low, high = step + 1, step + 2
        while high < UNPLANNED and self._end(high, step, elapsed, seconds_per_step, since) <= self.seconds:
            high *= 2
        while high - low > 1:
            middle = (low + high) // 2
            fits = self._end(middle, step, elapsed, seconds_per_step, since) <= self.seconds
            low, high = (middle, high) if fits else (low, middle)
        return low

    def _end(self, total: int, step: int, elapsed: float, seconds_per_step: float, since: int) -> float:
        """Seconds of a run of `total` steps of which `step` took `elapsed`."""
        done = (self._cost(step / total) - self._cost(since / total)) * total
        left = (self._cost(1.0) - self._cost(step / total)) * total
        return elapsed + left * seconds_per_step * (step - since) / done

    def _cost(self, part: float) -> float:
        """Cost of the first `part` of the steps, of a run of one step."""
        cost, left = 0.0, part
        for share, weight in self._costs:
            cost += weight * min(share, left)
            left -= min(share, left)
        return cost


def _read_plan(path: Path) -> list[tuple[int, int]]:
    """Entries of a plan file; ValueError with the path if it is damaged."""
    try:
        return [(int(step), int(total)) for step, total in json.loads(path.read_text(encoding="utf-8"))["entries"]]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged, or no plan of a run: {error!r}") from error
