"""Rules of a run after a loss spike."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dsv4.training.spikes import SpikeSettings

AfterLast = Literal["stop", "continue"]
Anticipate = Literal["after_rollback", "always", "never"]


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
    after_last: AfterLast = "stop"  # with a loss that is not finite a run always stops
    anticipate: Anticipate = "after_rollback"  # Anticipatory Routing
    anticipate_steps: int = 200  # behind the step of the spike
    delay: int = 1  # steps from the parameters that choose the experts to those that train them

    def __post_init__(self) -> None:
        for name, least in {
            "keep": 1,
            "margin": 0,
            "max_rollbacks": 0,
            "recovered": 1,
            "anticipate_steps": 0,
            "delay": 0,
        }.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: {least} or more")
        if self.after_last not in ("stop", "continue"):
            raise ValueError(f"after_last is {self.after_last!r}; allowed: stop, continue")
        if self.anticipate not in ("after_rollback", "always", "never"):
            raise ValueError(f"anticipate is {self.anticipate!r}; allowed: after_rollback, always, never")
