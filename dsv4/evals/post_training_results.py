"""results.json of a whole post-training run: scores of every model in every domain, efforts, train = serve."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dsv4.checkpoint.atomic import new_file
from dsv4.evals.intervals import difference, wilson

RESULTS = "results.json"
STUDENT_SHARE = 0.97  # of the specialists' mean that a student should reach

Domain = str
NotNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Count(_Table):
    """Right answers of those asked."""

    correct: Annotated[int, Field(ge=0)]
    asked: Annotated[int, Field(ge=1)]

    @model_validator(mode="after")
    def _check(self) -> Count:
        if self.correct > self.asked:
            raise ValueError(f"correct is {self.correct}; allowed: 0 to asked, {self.asked}")
        return self

    @property
    def rate(self) -> float:
        return self.correct / self.asked

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson 95 % interval of the rate."""
        return wilson(self.correct, self.asked)

    def better_than(self, other: Count) -> tuple[float, float]:
        """95 % interval of this rate minus the other's."""
        return difference((self.correct, self.asked), (other.correct, other.asked))


class Effort(_Table):
    """Share of right answers and mean tokens of an answer at one level of reasoning.

    `free`: of answers that no window of the level ends.
    """

    accuracy: Annotated[float, Field(ge=0.0, le=1.0)]
    tokens: NotNegative
    free: Effort | None = None

    def cells(self) -> tuple[str, str, str, str]:
        """Cells of a table: right and tokens, both again free; a dash for what was not measured."""
        own, free = (f"{100 * self.accuracy:.1f} %", f"{self.tokens:.1f}"), ("-", "-")
        return (*own, *(free if self.free is None else self.free.cells()[:2]))


Row = dict[Domain, Count]


class Scores(_Table):
    """A row for each model; `specialists` by their own domain."""

    base: Row
    sft: Row
    specialists: dict[Domain, Row]
    student: Row
    averaged: Row
    mixed: Row

    @model_validator(mode="after")
    def _check(self) -> Scores:
        domains = set(self.student)
        for name, row in self.rows():
            if set(row) != domains or not domains:
                raise ValueError(f"{name} has domains {sorted(row)}; allowed: those of the student, {sorted(domains)}")
        if set(self.specialists) != domains:
            raise ValueError(f"specialists are {sorted(self.specialists)}; allowed: one of each domain")
        return self

    def rows(self) -> Iterator[tuple[str, Row]]:
        """Every model's name and row."""
        yield "base", self.base
        yield "sft", self.sft
        yield from ((f"specialists.{domain}", row) for domain, row in self.specialists.items())
        yield "student", self.student
        yield "averaged", self.averaged
        yield "mixed", self.mixed


class Results(_Table):
    """All that results.json holds."""

    scores: Scores
    efforts: dict[str, Effort]
    train_serve_max_difference: NotNegative | None  # None: not measured in every run
    fine_tuned: Row = {}  # each specialist before its GRPO, in its own domain
    general: dict[str, dict[str, Count]] = {}  # tasks of no specialist: start, teacher, student; by mode

    @model_validator(mode="after")
    def _check(self) -> Results:
        names, modes = list(self.general), {tuple(row) for row in self.general.values()}
        if names and (names != ["start", "teacher", "student"] or len(modes) != 1):
            raise ValueError(f"general has {names}; allowed: start, teacher and student, with the same modes")
        return self

    @property
    def domains(self) -> tuple[Domain, ...]:
        return tuple(self.scores.student)

    def gains(self) -> dict[Domain, tuple[float, float]]:
        """Interval of each specialist's rate in its own domain minus the sft's."""
        scores = self.scores
        return {d: scores.specialists[d][d].better_than(scores.sft[d]) for d in self.domains}

    @property
    def student_share(self) -> float | None:
        """Mean rate of the student, in the mean rate of the specialists in their own domains; None if that is 0."""
        scores, count = self.scores, len(self.domains)
        teachers = sum(scores.specialists[d][d].rate for d in self.domains) / count
        return sum(scores.student[d].rate for d in self.domains) / count / teachers if teachers else None

    def of_grpo(self) -> Iterator[tuple[Domain, Count, Count, tuple[float, float]]]:
        """Each domain, its specialist's counts in it before GRPO and after, and the interval of the difference."""
        for domain, before in self.fine_tuned.items():
            after = self.scores.specialists[domain][domain]
            yield domain, before, after, after.better_than(before)

    @property
    def efforts_are_ordered(self) -> bool:
        """True if each level, in their order, takes more tokens than the one before."""
        return all(before.tokens < after.tokens for before, after in pairwise(self.efforts.values()))

    @property
    def efforts_pay(self) -> bool:
        """True if each level, in their order, is right as often as the one before, or more often."""
        return all(before.accuracy <= after.accuracy for before, after in pairwise(self.efforts.values()))

    def findings(self) -> Iterator[tuple[bool, str]]:
        """Aims of a run, each True if it is reached, with its figures in words."""
        for domain, (low, high) in self.gains().items():
            yield low > 0, f"specialist of {domain} minus sft: {100 * low:+.1f} to {100 * high:+.1f} points"
        share = self.student_share
        if share is not None:
            words = f"student: {100 * share:.1f} % of the mean of the specialists in their domains"
            yield share >= STUDENT_SHARE, f"{words}, {100 * STUDENT_SHARE:.0f} % wanted"
        if self.efforts:
            shown = ", ".join(f"{level} {effort.tokens:.0f}" for level, effort in self.efforts.items())
            yield self.efforts_are_ordered, f"mean tokens grow with the effort: {shown}"
            rates = ", ".join(f"{level} {100 * effort.accuracy:.1f} %" for level, effort in self.efforts.items())
            yield self.efforts_pay, f"right answers do not fall with it: {rates}"
        for mode, start in self.general.get("start", {}).items():
            low, high = self.general["student"][mode].better_than(start)
            yield (
                high >= 0,
                f"student minus start in the general tasks, {mode}: {100 * low:+.1f} to {100 * high:+.1f} points",
            )
        largest = self.train_serve_max_difference
        words = "not measured in every run" if largest is None else f"{largest:g}"
        yield largest == 0.0, f"largest difference of a log-probability, trained and served: {words}"


def read_results(path: Path) -> Results:
    """Results in a file, or in a model folder. ValueError, in words, if they are not whole."""
    path = path / RESULTS if path.is_dir() else path
    try:
        return Results.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{path}: {place or 'results'}: {first['msg']} ({error.error_count()} in all)") from error


def write_results(results: Results, path: Path) -> None:
    """Write results.json."""
    with new_file(path) as temporary:
        temporary.write_text(json.dumps(results.model_dump(), indent=2) + "\n", encoding="utf-8")


def make_results(
    scores: Mapping[str, Mapping[Domain, Count]],
    efforts: Mapping[str, Effort],
    train_serve: float | None,
    fine_tuned: Mapping[Domain, Count] | None = None,
    general: Mapping[str, Mapping[str, Count]] | None = None,
) -> Results:
    """Results from rows by model, whose names are `base`, `sft`, `specialists.DOMAIN`, ...; ValueError if one lacks."""
    prefix = "specialists."
    table: dict[str, object] = {name: dict(row) for name, row in scores.items() if not name.startswith(prefix)}
    table["specialists"] = {
        name.removeprefix(prefix): dict(row) for name, row in scores.items() if name.startswith(prefix)
    }
    return Results(
        scores=Scores.model_validate(table),
        efforts=dict(efforts),
        train_serve_max_difference=train_serve,
        fine_tuned=dict(fine_tuned or {}),
        general={name: dict(row) for name, row in (general or {}).items()},
    )
