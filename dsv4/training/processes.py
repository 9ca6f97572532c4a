"""Interface between the training loop and the processes that compute a step."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self

from dsv4.training.attention_phase import AttentionPhase
from dsv4.training.gradient import Result, Routing, Work


class Processes(Protocol):
    """Processes of a run, seen from one of them. Use as a context manager."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None, /
    ) -> bool | None: ...

    def gradient(self, work: Work) -> list[Result]:
        """Compute the gradient of a step; the processes' shares of its losses."""
        ...

    def numbers(self, work: Work) -> range:
        """Numbers of all batches of a step."""
        ...

    def anticipate(self, work: Work) -> dict[int, Routing]:
        """Routing of all batches of a step with the parameters of now, by batch number."""
        ...

    def update(self, rate: float, scale: float, attention: AttentionPhase = "sparse") -> None:
        """Step the parameters that the phase trains, with gradients times `scale`."""
        ...
