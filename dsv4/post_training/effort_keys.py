"""Keys of effort modes in recipes, with their defaults (reasons: docs/post-training.md)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from dsv4.data.tasks import Effort
from dsv4.post_training.efforts import EffortMode
from dsv4.post_training.length_penalty import MAX_BUDGET, MIN_BUDGET, BudgetPenalty, OverlengthPenalty
from dsv4.training.recipe import Section

Window = Annotated[float, Field(gt=0.0, le=1.0)]
Free = Annotated[float, Field(ge=0.0, lt=1.0)]
Budget = Annotated[int, Field(ge=MIN_BUDGET, le=MAX_BUDGET)]
PenaltyForm = Literal["mode", "budget", "none"]


class ModeSection(Section):
    """One mode: its window as a share of sampling.max_tokens; its penalty, `length` at the window, and 0 up to `free`,
    a share of the window; its scalar budget, for that form."""

    window: Window
    free: Free
    length: Annotated[float, Field(ge=0.0)] = 0.5
    budget: Budget


class LowSection(ModeSection):
    window: Window = 0.25
    free: Free = 0.0
    budget: Budget = 50


class HighSection(ModeSection):
    window: Window = 0.5
    free: Free = 0.25
    budget: Budget = 75


class MaxSection(ModeSection):
    window: Window = 1.0
    free: Free = 0.5
    budget: Budget = 100


class EffortsSection(Section):
    """The modes of problems.efforts, and the form of their penalties: a mode's, or V4.1's by scalar budgets."""

    penalty: PenaltyForm = "mode"
    low: LowSection = LowSection()
    high: HighSection = HighSection()
    max: MaxSection = MaxSection()
    norm: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0  # of the budget's penalty, a share of sampling.max_tokens
    k0: Annotated[float, Field(gt=0.0)] = 0.5
    tau: Annotated[float, Field(gt=0.0)] = 50.0
    cap: Annotated[float, Field(gt=0.0)] = 0.5

    def modes(self, efforts: Sequence[Effort], max_tokens: int) -> tuple[EffortMode, ...]:
        """The modes of the efforts, where an answer has at most `max_tokens` tokens."""
        return tuple(self._mode(effort, max_tokens) for effort in efforts)

    def _mode(self, effort: Effort, max_tokens: int) -> EffortMode:
        one: ModeSection = getattr(self, effort)
        window = max(1, round(one.window * max_tokens))
        if self.penalty == "none":
            return EffortMode(effort, window)
        if self.penalty == "mode":
            return EffortMode(effort, window, OverlengthPenalty(window, int(one.free * window), one.length).reward)
        scalar = BudgetPenalty(self.norm * max_tokens, self.k0, self.tau, self.cap)
        return EffortMode(effort, window, lambda tokens: scalar.reward(tokens, one.budget))
