"""Interface of a domain: its problems by (seed, number, split)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from random import Random
from typing import ClassVar, Literal

from dsv4.data.stable_hash import stable_hash
from dsv4.data.tasks import Split, split_of
from dsv4.post_training.problems import Problem

Level = Literal["standard", "easy"]  # easy: what a model of some ten million parameters can learn in minutes
LEVELS: tuple[Level, ...] = ("standard", "easy")
DRAWS = 10_000  # of a candidate until one is of the wanted split


class Domain(ABC):
    """A family of problems of one specialist."""

    name: ClassVar[str]

    def prepare(self) -> None:  # noqa: B027  most domains need nothing
        """Look for what rewards need besides Python. ValueError, in words, if it is missing."""

    @abstractmethod
    def draw(self, rng: Random) -> Problem | None:
        """One candidate, whose key says what is asked however it is worded; None if it is no good problem."""

    def problem(self, seed: int, number: int, split: Split = "train") -> Problem:
        """The problem that (domain, seed, number, split) determines. No key is in both splits."""
        rng = Random(stable_hash("domain", self.name, seed, number, split))
        for _ in range(DRAWS):
            found = self.draw(rng)
            if found is not None and split_of(found.key) == split:
                return found
        raise RuntimeError(f"domain {self.name}: no problem of split {split!r} in {DRAWS} draws for {seed}, {number}")
