"""Batch size of a stage: micro-batches per step, growing linearly with the tokens seen (DeepSeek-V4 report)."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class BatchSize:
    """Micro-batches per process and step: `first`, growing to `last` over the stage's first `ramp_tokens`.

    `tokens` are those of one micro-batch of every process. The size is a function of the step in the stage alone, so
    that any process knows the batches of any step.
    """

    tokens: int
    last: int
    first: int = 0  # 0: `last`, no ramp
    ramp_tokens: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.last < 1:
            raise ValueError(f"{self.last} micro-batches of {self.tokens} tokens; allowed: 1 or more of each")
        if not self.first:
            object.__setattr__(self, "first", self.last)
        if not 1 <= self.first <= self.last:
            raise ValueError(f"a batch size from {self.first} to {self.last} micro-batches; allowed: 1 to the last")
        if (self.first < self.last) != (self.ramp_tokens > 0):
            raise ValueError(
                f"a batch size from {self.first} to {self.last} micro-batches over {self.ramp_tokens} tokens; a ramp "
                "has a smaller first size and 1 or more tokens"
            )

    @property
    def ramp(self) -> list[int]:
        """Tokens, of all processes, before each step of the ramp and before the first step of full size."""
        return [self.tokens * count for count in _ramp(self)]

    def at(self, step: int) -> int:
        """Micro-batches of step `step` of the stage."""
        return self.before(step + 1) - self.before(step)

    def before(self, step: int) -> int:
        """Micro-batches of all earlier steps of the stage."""
        ramp = _ramp(self)
        return ramp[step] if step < len(ramp) else ramp[-1] + self.last * (step - len(ramp) + 1)

    def steps(self, tokens: int) -> int:
        """Steps that see at least `tokens`."""
        ramp, wanted = _ramp(self), -(-tokens // self.tokens)
        if wanted <= ramp[-1]:
            return bisect_left(ramp, wanted)
        return len(ramp) - 1 + -(-(wanted - ramp[-1]) // self.last)


@lru_cache(maxsize=64)
def _ramp(size: BatchSize) -> tuple[int, ...]:
    """Micro-batches before each step of the ramp, and before the first step of full size."""
    before = [0]
    while (seen := before[-1] * size.tokens) < size.ramp_tokens:
        before.append(before[-1] + size.first + (size.last - size.first) * seen // size.ramp_tokens)
    return tuple(before)
