"""Ranks per named dimension of parallelism; needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

DIMENSIONS = ("pipeline", "data", "context", "expert")  # outermost first: ranks of one `expert` group are neighbors


@dataclass(frozen=True)
class Degrees:
    """Ranks per dimension. A rank's batches are its own along `data` and `expert`, shared along the other two."""

    pipeline: int = 1
    data: int = 1
    context: int = 1
    expert: int = 1

    def __post_init__(self) -> None:
        for name in DIMENSIONS:
            if getattr(self, name) < 1:
                raise ValueError(f"parallel degree {name} is {getattr(self, name)}; allowed: 1 or more")

    @property
    def ranks(self) -> int:
        return self.pipeline * self.data * self.context * self.expert

    @property
    def batches(self) -> int:
        """Ranks with batches of their own: the data-parallel processes of the run."""
        return self.data * self.expert

    @property
    def shards(self) -> int:
        """Ranks that hold the same layers: those that share the dense parameters of a pipeline stage."""
        return self.data * self.context * self.expert

    def check(self, world: int, experts: int, layers: int) -> None:
        """ValueError unless there are `world` ranks, and `experts` per layer and `layers` can be divided so."""
        if self.ranks != world:
            names = " x ".join(f"{name} {getattr(self, name)}" for name in DIMENSIONS)
            raise ValueError(f"the degrees {names} make {self.ranks} ranks; allowed: as many as there are, {world}")
        if experts % self.expert:
            raise ValueError(f"parallel degree expert is {self.expert}; allowed: divisors of the {experts} experts")
        if self.pipeline > layers:
            raise ValueError(f"parallel degree pipeline is {self.pipeline}; allowed: up to the {layers} layers")
