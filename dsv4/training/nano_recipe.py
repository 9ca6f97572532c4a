"""The nano recipe: one file with the data, the budget, and a pre-training recipe each for the base and for its sft."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from dsv4.analysis.training_flops import training_flops
from dsv4.config import ModelConfig
from dsv4.training.pretrain_recipe import ModelSection, PretrainRecipe, StageSection
from dsv4.training.recipe import Section

PARTS = ("base", "sft")


class NanoDataSection(Section):
    """The corpus, and the share of its haystacks and of the tokenizer's sample that are made.

    An empty name is no corpus: the sft of a model that was given is then on the tasks alone.
    """

    corpus: str = "corpus"
    seed: int = 1
    scale: Annotated[float, Field(gt=0.0)] = 1.0


class NanoRecipe(Section):
    """A whole run. `steps`: of the base and, by `sft_share`, of its sft, in place of the budget of `seconds`."""

    seconds: Annotated[float, Field(gt=0.0)] = 21600.0
    steps: Annotated[int, Field(ge=1)] | None = None
    sft_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.14
    data: NanoDataSection = NanoDataSection()
    base: PretrainRecipe = PretrainRecipe()
    sft: PretrainRecipe = PretrainRecipe()

    def part(self, name: str, data: Path) -> PretrainRecipe:
        """Pre-training recipe of a part, with the tokenizer and the shards of the data in folder `data`."""
        recipe: PretrainRecipe = getattr(self, name)
        shards = [tuple(f"{data / 'shards'}/{shard}" for shard in stage.shards) for stage in recipe.stages]
        updates = [{"shards": found} if self.data.corpus else {"shards": (), "tasks": 1.0} for found in shards]
        stages = tuple(stage.model_copy(update=update) for stage, update in zip(recipe.stages, updates, strict=True))
        found = recipe.data.model_copy(update={"tokenizer": str(data / "tokenizer")})
        return recipe.model_copy(update={"data": found, "stages": stages})

    def part_seconds(self, name: str) -> float:
        """Budget of a part."""
        if self.parts == (name,):
            return self.seconds
        return self.seconds * (self.sft_share if name == "sft" else 1 - self.sft_share)

    def start_from(self, model: Path) -> NanoRecipe:
        """The same without the base: the sft goes on from a model folder."""
        sft = self.sft.model_copy(update={"model": ModelSection(start=str(model.absolute()))})
        return self.model_copy(update={"sft": sft})

    @property
    def parts(self) -> tuple[str, ...]:
        """Parts that are trained."""
        return PARTS if self.sft.model.start is None else PARTS[1:]

    def part_steps(self, name: str) -> int | None:
        """Steps of a part, None if time decides."""
        if self.steps is None or name == "base" or self.parts == (name,):
            return self.steps
        return max(1, round(self.steps * self.sft_share))


def step_flops(recipe: PretrainRecipe, config: ModelConfig) -> list[tuple[float, float]]:
    """(share of the steps, operations of a step) of every stage, its documents as long as they may be."""
    replicas = recipe.run.replicas
    steps = [stage.num_steps(replicas) for stage in recipe.stages]
    costs: list[tuple[float, float]] = []
    for stage, count in zip(recipe.stages, steps, strict=True):
        documents = _documents(stage)
        flops = training_flops(config, documents, stage.attention, recipe.loss.mtp > 0)
        costs.append((count / sum(steps), flops * stage.size(replicas).last * replicas))
    return costs


def _documents(stage: StageSection) -> tuple[int, ...]:
    """Lengths of the documents in a full row."""
    return (stage.sequence,) * max(1, stage.row_tokens // stage.sequence)
