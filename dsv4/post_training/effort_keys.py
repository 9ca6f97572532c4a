"""Keys of effort modes in recipes, with their defaults (reasons: docs/post-training.md)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from dsv4.post_training.effort_names import NON_THINK, Mode, asked_modes
from dsv4.post_training.efforts import EffortMode
from dsv4.post_training.key_types import NotNegative, Positive
from dsv4.post_training.length_penalty import BudgetPenalty, OverlengthPenalty
from dsv4.tokenizer.effort_number import MAX_BUDGET, MIN_BUDGET
from dsv4.training.recipe import Section

Window = Annotated[float, Field(gt=0.0, le=1.0)]
Free = Annotated[float, Field(ge=0.0, lt=1.0)]
Budget = Annotated[int, Field(ge=MIN_BUDGET, le=MAX_BUDGET)]
PenaltyForm = Literal["mode", "budget", "none"]


class ModeSection(Section):
    """One mode: its window as a share of sampling.max_tokens; its penalty, `length` at the window, and 0 up to `free`,
    a share of the window."""

    window: Window
    free: Free
    length: NotNegative = 0.5


class NoneSection(ModeSection):
    window: Window = 0.25
    free: Free = 0.5


class LevelSection(ModeSection):
    """A mode that thinks: the budget that it stands for in V4.1's form, too."""

    budget: Budget


class LowSection(LevelSection):
    window: Window = 0.25
    free: Free = 0.0
    budget: Budget = 50


class HighSection(LevelSection):
    window: Window = 0.5
    free: Free = 0.25
    budget: Budget = 75


class MaxSection(LevelSection):
    window: Window = 1.0
    free: Free = 0.5
    budget: Budget = 100


class EffortsSection(Section):
    """The formulation of problems.efforts: modes with windows and penalties of their own, or V4.1's budgets.

    `budget`: the prompt has the budget's number, by which answers are penalized; all have the same window. Answers
    without thinking, which have no number, keep their mode's.
    """

    penalty: PenaltyForm = "mode"
    none: NoneSection = NoneSection()
    low: LowSection = LowSection()
    high: HighSection = HighSection()
    max: MaxSection = MaxSection()
    norm: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0  # of the budget's penalty, a share of sampling.max_tokens
    k0: Positive = BudgetPenalty.k0
    tau: Positive = BudgetPenalty.tau
    cap: Positive = BudgetPenalty.cap

    def modes(self, efforts: Sequence[str | int], max_tokens: int) -> tuple[EffortMode, ...]:
        """The modes of the efforts, where an answer has at most `max_tokens` tokens."""
        return tuple(self._mode(effort, max_tokens) for effort in asked_modes(efforts))

    def _mode(self, effort: Mode, max_tokens: int) -> EffortMode:
        if self.penalty == "budget" and effort != NON_THINK:
            budget: int = effort if isinstance(effort, int) else getattr(self, effort).budget
            scalar = BudgetPenalty(self.norm * max_tokens, self.k0, self.tau, self.cap)
            return EffortMode(budget, penalty=lambda tokens: scalar.reward(tokens, budget))
        if isinstance(effort, int):
            return EffortMode(effort)
        one: ModeSection = getattr(self, effort)
        window = max(1, round(one.window * max_tokens))
        if self.penalty == "none":
            return EffortMode(effort, window)
        return EffortMode(effort, window, OverlengthPenalty(window, int(one.free * window), one.length).reward)
