"""Stability of a run: on a spike, back to a state before it, and on with Anticipatory Routing and the same data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dsv4.training.anticipatory import RoutingAhead
from dsv4.training.gradient import Routing, Work
from dsv4.training.processes import Processes
from dsv4.training.spikes import Spike, SpikeDetector
from dsv4.training.stability_settings import StabilitySettings


class SpikeError(RuntimeError):
    """A spike came back after the last rollback that the settings allow, or there is no state to roll back to."""


@dataclass
class _Incident:
    """A spike that the run is dealing with, and the step that it went back to last."""

    spike: int
    target: int
    rollbacks: int = 1


class Kept(Protocol):
    """States of the run that it may go back to (kept_states.py, kept_checkpoints.py)."""

    def steps(self) -> list[int]: ...

    def path(self, step: int) -> Path: ...

    def keep(self, state: Path, step: int) -> None: ...

    def drop_after(self, step: int) -> None: ...


class Stability:
    """Watches a run's steps and chooses the state to go back to. `state()` is saved with the run."""

    def __init__(self, settings: StabilitySettings, kept: Kept, state: Mapping[str, Any]) -> None:
        self.settings, self.kept = settings, kept
        self.rollbacks = 0  # of the whole run
        self.incident: _Incident | None = None
        self.until = 0  # step at which Anticipatory Routing ends
        self.restore(state)
        if state:
            self.rollbacks, self.until = state["rollbacks"], state["until"]
            self.incident = _Incident(**state["incident"]) if state["incident"] else None

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take the detector and the routing of a saved state; what the run knows of rollbacks stays."""
        self.detector = SpikeDetector(self.settings.spikes, **(state["detector"] if state else {}))
        self.routing = RoutingAhead(state["routing"] if state else None)

    def state(self) -> dict[str, Any]:
        incident = vars(self.incident) if self.incident else None
        return {
            "detector": self.detector.state(), "rollbacks": self.rollbacks, "incident": incident, "until": self.until,
            "routing": self.routing.state(),
        }  # fmt: skip

    def anticipates(self, step: int) -> bool:
        """True if step `step` runs with Anticipatory Routing."""
        mode = self.settings.anticipate
        return mode == "always" or (mode == "after_rollback" and step < self.until)

    def keep(self, saved: Path, step: int) -> None:
        """Keep the state just saved at `step`, unless a spike may have begun."""
        if not suspects(self.state()):
            self.kept.keep(saved, step)

    def route_ahead(self, steps: range, make_work: Callable[[int], Work], replicas: Processes) -> dict[int, Routing]:
        """Routing of the first of `steps`, by batch number, as chosen `delay` steps before; empty without.

        `steps` ends with the run. Those up to `delay` ahead that have no routing yet get theirs now; when Anticipatory
        Routing begins these are all, so that the delay grows from 0 to its full length.
        """
        if not self.anticipates(steps.start):
            self.routing = RoutingAhead()
            return {}
        for step in steps[: self.settings.delay + 1]:
            work = make_work(step)
            if self.anticipates(step) and not self.routing.holds(work.stage, replicas.numbers(work)):
                self.routing.add(work.stage, replicas.anticipate(work))
        work = make_work(steps.start)
        return self.routing.take(work.stage, replicas.numbers(work))

    def observe(self, step: int, phase: list[Any], loss: float, grad_norm: float) -> Spike | None:
        """Record a step before its update; return the spike that it completes, if any."""
        incident = self.incident
        if incident is not None and step > incident.spike + self.settings.recovered:
            self.incident = None
        return self.detector.observe(step, phase, {"loss": loss, "grad_norm": grad_norm})

    def choose(self, spike: Spike) -> Path | None:
        """State to go back to; None if the run is to go on, or to stop by its own error, as it is.

        SpikeError if no rollback is left or no state, the settings say stop, and the spike's value is finite.
        """
        steps = [step for step in self.kept.steps() if step < spike.start]
        used = self.incident.rollbacks if self.incident else 0
        if steps and used < self.settings.max_rollbacks:
            newest = spike.start - self.settings.margin
            if self.incident is not None:
                newest = min(newest, self.incident.target - 1)
            return self.kept.path(max((step for step in steps if step <= newest), default=steps[0]))
        if self.settings.after_last == "stop" and math.isfinite(spike.value):
            why = f"after {used} rollbacks" if steps else "and no state before it is kept"
            raise SpikeError(
                f"step {spike.step}: {spike.statistic} {spike.value:.4g} is above {spike.limit:.4g} since step "
                f"{spike.start}, {why}; nothing was updated"
            )
        self.detector.high_since = None
        return None

    def went_back(self, spike: Spike, step: int, state: Mapping[str, Any]) -> None:
        """Record that the run is at `step` again, with the saved `state`; later states are removed."""
        before = self.incident
        self.incident = (
            _Incident(max(spike.step, before.spike), step, before.rollbacks + 1)
            if before
            else _Incident(spike.step, step)
        )
        self.rollbacks += 1
        self.until = max(self.until, spike.step + self.settings.anticipate_steps)
        self.restore(state)
        self.kept.drop_after(step)


def suspects(state: Mapping[str, Any]) -> bool:
    """True if, by a Stability's state, a spike may have begun: a state of the run of then is none to go back to."""
    return bool(state) and state["detector"]["high_since"] is not None


def describe_rollback(spike: Spike, attempt: int, step: int) -> dict[str, Any]:
    """Record of a rollback to `step` for the metrics; `attempt` is the one that it ends."""
    finite = {"value": spike.value, "limit": spike.limit}
    numbers = {name: value if math.isfinite(value) else None for name, value in finite.items()}
    return {
        "step": spike.step, "attempt": attempt, "event": "rollback", "to": step, "spike_start": spike.start,
        "statistic": spike.statistic, **numbers,
    }  # fmt: skip
