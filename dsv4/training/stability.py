"""Stability of a run: on a spike, back to a state before it, to go on with the data in the order that it had."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dsv4.training.kept_states import KeptStates
from dsv4.training.spikes import Spike, SpikeDetector, SpikeSettings


class SpikeError(RuntimeError):
    """A spike came back after the last rollback that the settings allow, or there is no state to roll back to."""


@dataclass(frozen=True)
class StabilitySettings:
    """Rules after a spike; the report discloses none of the numbers. docs/training.md has the reasons for these.

    Rollbacks for one spike, and for those within `recovered` steps behind it, are one incident; each goes further back
    than the one before, as far as there are kept states.
    """

    spikes: SpikeSettings = field(default_factory=SpikeSettings)
    keep: int = 3  # states, one per save
    margin: int = 10  # steps from the state that a run goes back to, to the first step of the spike, if one is so old
    max_rollbacks: int = 3  # per incident
    recovered: int = 64  # steps behind the spike after which an incident is over
    after_last: Literal["stop", "continue"] = "stop"  # with a loss that is not finite a run always stops

    def __post_init__(self) -> None:
        for name, least in {"keep": 1, "margin": 0, "max_rollbacks": 0, "recovered": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: {least} or more")
        if self.after_last not in ("stop", "continue"):
            raise ValueError(f"after_last is {self.after_last!r}; allowed: stop, continue")


@dataclass
class _Incident:
    """A spike that the run is dealing with, and the step that it went back to last."""

    spike: int
    target: int
    rollbacks: int = 1


class Stability:
    """Watches a run's steps and chooses the state to go back to. `state()` is saved with the run."""

    def __init__(self, settings: StabilitySettings, folder: Path, state: Mapping[str, Any]) -> None:
        self.settings = settings
        self.kept = KeptStates(folder, settings.keep)
        self.rollbacks = 0  # of the whole run
        self.incident: _Incident | None = None
        self.restore(state)
        if state:
            self.rollbacks = state["rollbacks"]
            self.incident = _Incident(**state["incident"]) if state["incident"] else None

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take the detector of a saved state; what the run knows of rollbacks stays."""
        self.detector = SpikeDetector(self.settings.spikes, **(state["detector"] if state else {}))

    def state(self) -> dict[str, Any]:
        incident = vars(self.incident) if self.incident else None
        return {"detector": self.detector.state(), "rollbacks": self.rollbacks, "incident": incident}

    def keep(self, saved: Path, step: int) -> None:
        """Keep the state just saved at `step`, unless a spike may have begun."""
        if self.detector.high_since is None:
            self.kept.keep(saved, step)

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
        self.restore(state)
        self.kept.drop_after(step)


def describe_rollback(spike: Spike, attempt: int, step: int) -> dict[str, Any]:
    """Record of a rollback to `step` for the metrics; `attempt` is the one that it ends."""
    finite = {"value": spike.value, "limit": spike.limit}
    numbers = {name: value if math.isfinite(value) else None for name, value in finite.items()}
    return {
        "step": spike.step, "attempt": attempt, "event": "rollback", "to": step, "spike_start": spike.start,
        "statistic": spike.statistic, **numbers,
    }  # fmt: skip
