"""The nano recipe: the data, the budget, and a pre-training recipe each for base, mid, sft and long."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from dsv4.analysis.training_flops import training_flops
from dsv4.config import ModelConfig
from dsv4.training.pretrain_recipe import ModelSection, PretrainRecipe
from dsv4.training.recipe import Section
from dsv4.training.stage_section import StageSection

PARTS = ("base", "mid", "sft", "long")  # each goes on from the one before
PART_SEED = 1_000_000_007  # between the seeds of parts, far from those of their stages (training/pretrain_run.py)


class NanoDataSection(Section):
    """The corpus, and the share of its haystacks and of the tokenizer's sample that are made.

    An empty name is no corpus: the sft of a model that was given is then on the tasks alone.
    """

    corpus: str = "corpus"
    seed: int = 1
    scale: Annotated[float, Field(gt=0.0)] = 1.0


class NanoRecipe(Section):
    """A whole run. `mid_share`, `sft_share` and `long_share`: of `seconds`, the base's being the rest.

    `steps`: of the first part, in place of a budget; the others have as many more or fewer as their shares say.
    """

    seconds: Annotated[float, Field(gt=0.0)] = 21600.0
    steps: Annotated[int, Field(ge=1)] | None = None
    mid_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.26
    sft_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.27
    long_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.04
    data: NanoDataSection = NanoDataSection()
    base: PretrainRecipe = PretrainRecipe()
    mid: PretrainRecipe = PretrainRecipe()
    sft: PretrainRecipe = PretrainRecipe()
    long: PretrainRecipe = PretrainRecipe()

    @model_validator(mode="after")
    def _check(self) -> NanoRecipe:
        if sum(self._later.values()) >= 1:
            found = ", ".join(f"{name}_share is {share}" for name, share in self._later.items())
            raise ValueError(f"{found}; allowed: below 1 together")
        return self

    def part(self, name: str, data: Path) -> PretrainRecipe:
        """Pre-training recipe of a part, with the tokenizer and the shards of the data in folder `data`."""
        recipe: PretrainRecipe = getattr(self, name)
        shards = [tuple(f"{data / 'shards'}/{shard}" for shard in stage.shards) for stage in recipe.stages]
        updates = [{"shards": found} if self.data.corpus else {"shards": (), "tasks": 1.0} for found in shards]
        stages = tuple(stage.model_copy(update=update) for stage, update in zip(recipe.stages, updates, strict=True))
        found = recipe.data.model_copy(update={"tokenizer": str(data / "tokenizer")})
        # With one seed the parts would draw the same documents and tasks in the same order.
        run = recipe.run.model_copy(update={"seed": recipe.run.seed + PART_SEED * PARTS.index(name)})
        return recipe.model_copy(update={"data": found, "stages": stages, "run": run})

    def part_seconds(self, name: str) -> float:
        """Budget of a part."""
        return self.seconds * self._share(name) / sum(self._share(part) for part in self.parts)

    def start_from(self, model: Path) -> NanoRecipe:
        """The same without what comes before the sft, which goes on from a model folder."""
        sft = self.sft.model_copy(update={"model": ModelSection(start=str(model.absolute()))})
        return self.model_copy(update={"sft": sft})

    @property
    def parts(self) -> tuple[str, ...]:
        """Parts that are trained: from the sft on if it has a start, without long where no corpus has long texts."""
        first = 0 if self.sft.model.start is None else PARTS.index("sft")
        return PARTS[first:] if self.data.corpus else ("sft",)

    def part_steps(self, name: str) -> int | None:
        """Steps of a part, None if time decides."""
        if self.steps is None:
            return None
        return max(1, round(self.steps * self._share(name) / self._share(self.parts[0])))

    def _share(self, name: str) -> float:
        return self._later.get(name, 1 - sum(self._later.values()))

    @property
    def _later(self) -> dict[str, float]:
        """Shares of what follows the base."""
        return {"mid": self.mid_share, "sft": self.sft_share, "long": self.long_share}


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
