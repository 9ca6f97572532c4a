"""Age of rollouts: updates of the weights between those that drew a token and those that learn from it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dsv4.post_training.rollouts import Sampled


@dataclass(frozen=True)
class Staleness:
    """Staleness of tokens, in updates: `largest` of a token, `total` over all `tokens`."""

    largest: int = 0
    total: int = 0
    tokens: int = 0

    @property
    def mean(self) -> float:
        return self.total / self.tokens if self.tokens else 0.0


def staleness(rollouts: Iterable[Sampled], version: int) -> Staleness:
    """Staleness of rollouts for a learner with the weights `version`, which no token is later than."""
    drawn = [(version - drawer, count) for rollout in rollouts for drawer, count in rollout.drawn_by]
    return Staleness(
        max((age for age, _ in drawn), default=0),
        sum(age * count for age, count in drawn),
        sum(count for _, count in drawn),
    )
