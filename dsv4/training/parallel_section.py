"""Keys of a recipe for several ranks, and the settings that go with one process alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from dsv4.analysis.degrees import Degrees
from dsv4.config import ModelConfig
from dsv4.training.recipe import Section

Count = Annotated[int, Field(ge=1)]


class ParallelSection(Section):
    """Ranks per dimension of the mesh (parallel/mesh.py), whose product torchrun starts; all 1: one process."""

    pipeline: Count = 1
    data: Count = 1
    context: Count = 1
    expert: Count = 1
    stages: tuple[Count, ...] = ()  # main layers of each stage of the pipeline; left out: stages of about equal cost
    keep_gathered: bool = False  # a block's parameters from its forward to its backward

    def degrees(self) -> Degrees:
        return Degrees(self.pipeline, self.data, self.context, self.expert)

    def check(self, config: ModelConfig, alone: Sequence[str]) -> None:
        """ValueError for degrees that the model cannot be divided into, or `alone`: settings of one process alone."""
        degrees = self.degrees()
        degrees.check(degrees.ranks, config.n_routed_experts, config.num_hidden_layers)
        if self.stages and (len(self.stages) != self.pipeline or sum(self.stages) != config.num_hidden_layers):
            raise ValueError(
                f"parallel.stages {list(self.stages)}; allowed: parallel.pipeline, {self.pipeline}, numbers that add "
                f"up to the model's {config.num_hidden_layers} layers"
            )
        if degrees.ranks > 1 and alone:
            raise ValueError(f"{', '.join(alone)} on {degrees.ranks} ranks; allowed: in one process (docs/parallel.md)")
