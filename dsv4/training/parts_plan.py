"""Plans of a recipe that holds several pre-training runs, one after the other: recipes/nano.toml. Needs no torch."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv4.training.nano_recipe import PARTS, NanoRecipe
from dsv4.training.prediction import RunPlan
from dsv4.training.pretrain_recipe import PretrainRecipe
from dsv4.training.recipe import read_recipe


@dataclass(frozen=True)
class PartsPlan:
    """Predictions of the parts by name. `budget`: the seconds after which the run itself ends, whatever it has seen."""

    parts: dict[str, RunPlan]
    budget: float

    @property
    def seconds(self) -> float:
        return sum(plan.seconds for plan in self.parts.values())

    @property
    def gpu_hours(self) -> float:
        return sum(plan.gpu_hours for plan in self.parts.values())

    @property
    def cost(self) -> float:
        return sum(plan.gpu_hours * plan.price for plan in self.parts.values())

    def to_dict(self) -> dict[str, Any]:
        """The plans as one object for JSON; where one does not fit, times and cost are null."""
        plans = self.parts.values()
        fits = all(plan.fits for plan in plans)
        time = {"seconds": self.seconds, "gpu_hours": self.gpu_hours, "cost": self.cost}
        return {
            "parts": {name: plan.to_dict() for name, plan in self.parts.items()},
            "fits": fits,
            "peak_memory_bytes": round(max(stage.memory.total for plan in plans for stage in plan.stages)),
            "tokens": sum(stage.shape.tokens for plan in plans for stage in plan.stages),
            "budget_seconds": self.budget,
            **(time if fits else dict.fromkeys(time)),
        }


def has_parts(name: str) -> bool:
    """True if the file `name` is a recipe of several parts. A file that cannot be read is left to `read_recipe`."""
    path = Path(name)
    if not path.is_file():
        return False
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        return False
    return any(isinstance(values.get(part), dict) for part in PARTS)


def plan_parts(name: str, overrides: Sequence[str], plan: Callable[[PretrainRecipe], RunPlan]) -> PartsPlan:
    """Predict every part that the recipe trains, each by `plan`, on all the tokens of its stages.

    ValueError if a part has none: its default stages have 100 steps, which are no part of such a run.
    """
    recipe = read_recipe(NanoRecipe, Path(name), overrides)
    found: dict[str, RunPlan] = {}
    for part in recipe.parts:
        own: PretrainRecipe = getattr(recipe, part)
        if not own.stages:
            raise ValueError(
                f"{name}: {part} has no stages; allowed: one or more, for each of {', '.join(recipe.parts)}"
            )
        found[part] = plan(own.resolve())
    return PartsPlan(found, recipe.seconds)
