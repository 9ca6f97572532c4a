"""All domains by name, and a source of problems from a mixture of domains and tasks."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from random import Random
from typing import TYPE_CHECKING, Any

from dsv4.data.stable_hash import stable_hash
from dsv4.post_training.problems import Problem, ProblemSource

if TYPE_CHECKING:
    from dsv4.data.tasks import Split
    from dsv4.post_training.domains.domain import Domain, Level

DOMAINS: dict[str, tuple[str, str]] = {  # name -> module and class, imported where they are asked for
    "code": ("dsv4.post_training.domains.code", "Code"),
    "instructions": ("dsv4.post_training.domains.instructions", "InstructionFollowing"),
    "mathematics": ("dsv4.post_training.domains.mathematics", "Mathematics"),
    "terminal": ("dsv4.post_training.domains.agent", "Terminal"),
    "tools": ("dsv4.post_training.domains.agent", "Tools"),
}


PARTIAL = ("code", "instructions")  # whose answers may be right in part


@functools.cache
def open_domain(name: str, thinking: bool | None = None, level: Level = "standard", partial: bool = False) -> Domain:
    """The domain of a name. ValueError if there is none of the name.

    `thinking` None leaves the mode to it. `partial`: of PARTIAL, an answer that is right in part has a part of the
    reward.
    """
    if name not in DOMAINS:
        raise ValueError(f"unknown domain {name}; allowed: {', '.join(sorted(DOMAINS))}")
    module, kind = DOMAINS[name]
    made = getattr(import_module(module), kind)
    given: dict[str, Any] = {"level": level}
    if thinking is not None:
        given["thinking"] = thinking
    if partial and name in PARTIAL:
        given["partial"] = True
    return made(**given)


@dataclass(frozen=True)
class DomainProblems:
    """Problems of domains, `weights` by name. ValueError for an unknown one, one that lacks what it needs, or `partial`
    rewards of domains that have none."""

    weights: Mapping[str, float]
    seed: int = 1
    thinking: bool | None = None
    split: Split = "train"
    level: Level = "standard"
    partial: bool = False
    _names: tuple[str, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.weights:
            raise ValueError(f"no domains; allowed: {', '.join(sorted(DOMAINS))}")
        for name, weight in self.weights.items():
            if not weight > 0.0:
                raise ValueError(f"the weight of domain {name} is {weight}; allowed: more than 0")
            self._open(name).prepare()
        if self.partial and not {*self.weights} & {*PARTIAL}:
            raise ValueError(f"partial rewards of {', '.join(self.weights)}; allowed: {', '.join(PARTIAL)} among them")
        object.__setattr__(self, "_names", tuple(sorted(self.weights)))

    def problem(self, number: int, /) -> Problem:
        rng = Random(stable_hash("domain problem", self.seed, number))
        name = rng.choices(self._names, [self.weights[name] for name in self._names])[0]
        return self._open(name).problem(self.seed, number, self.split)

    def _open(self, name: str) -> Domain:
        return open_domain(name, self.thinking, self.level, self.partial)


@dataclass(frozen=True)
class MixedProblems:
    """Problems of several sources, in the ratio of their weights."""

    parts: tuple[tuple[ProblemSource, float], ...]
    seed: int = 1

    def problem(self, number: int, /) -> Problem:
        total = sum(weight for _, weight in self.parts)
        drawn = Random(stable_hash("mixed problem", self.seed, number)).random() * total
        for source, weight in self.parts:
            if drawn < weight:
                return source.problem(number)
            drawn -= weight
        return self.parts[-1][0].problem(number)  # rounding


def mixed(parts: Sequence[tuple[ProblemSource, float]], seed: int) -> ProblemSource:
    """The problems of the sources by their weights; of one source, its own."""
    return parts[0][0] if len(parts) == 1 else MixedProblems(tuple(parts), seed)
