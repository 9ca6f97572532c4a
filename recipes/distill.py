"""Distil teachers into a student on the student's own samples: full-vocabulary reverse KL, token by token."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from dsv4.commands.recipe_flags import parse
from dsv4.model_folder import resolve_model
from dsv4.post_training.distillation import DistillationRun
from dsv4.post_training.given_texts import TEXTS, GivenTexts
from dsv4.post_training.recipe_run import run_recipe
from dsv4.post_training.recipes import DistillRecipe
from dsv4.post_training.served_policy import ServedPolicy
from dsv4.post_training.teachers import Teacher, Teachers

TEACHERS, GIVEN = "teachers.txt", "texts.json"  # of a run's folder


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe; 0 when the model folder is written."""
    return run_recipe("distill", DistillRecipe, parse("distill", arguments), start)


def start(
    recipe: DistillRecipe, policy: ServedPolicy, options: argparse.Namespace, console: Console
) -> DistillationRun:
    """The run, at the step saved in its folder."""
    teachers = teachers_of_run(options)
    config, run, problems = policy.model.config, recipe.run, recipe.problems
    asked = problems.asked_modes(problems.rows(rewarded=False))
    texts = recipe.texts(options.model)
    if texts is not None:
        if TEXTS in (domain for domain, _ in asked):
            raise ValueError(f"problems of a domain {TEXTS} beside distillation.texts; allowed: another name")
        teachers.setdefault(TEXTS, Teacher(options.model))
        asked.append((TEXTS, None))
        check_texts(texts, options)
    found = Teachers(
        teachers, options.run_dir / "hidden", config.vocab_size, numerics=run.numerics, device=run.device,
        quantized=run.quantized,
    )  # fmt: skip
    found.check(asked, options.model)
    return DistillationRun(
        policy, recipe.optimizer.optimizer(policy.model, config), recipe.source(), found, recipe.loop(),
        recipe.settings(), options.run_dir, console,
        service=recipe.service.service(run, recipe.sampling, options.model, options.run_dir, console), texts=texts,
    )  # fmt: skip


def check_texts(texts: GivenTexts, options: argparse.Namespace) -> None:
    """Note a run's texts. ValueError if one that goes on began with others."""
    if options.resume and (options.run_dir / GIVEN).read_text(encoding="utf-8") != texts.note:
        raise ValueError(f"--resume: distillation.texts are not what the run in {options.run_dir} began with")
    options.notes = getattr(options, "notes", {}) | {GIVEN: texts.note}


def teachers_of_run(options: argparse.Namespace) -> dict[str, Teacher]:
    """Teachers of the command line; of a run that goes on, those that it began with.

    ValueError if they differ, or a domain has two.
    """
    given = read_teachers(options.teacher)
    path: Path = options.run_dir / TEACHERS
    if options.resume and path.exists():
        began = read_teachers(path.read_text(encoding="utf-8").splitlines())
        if given and noted(given) != noted(began):
            raise ValueError(f"--resume: the run in {options.run_dir} began with --teacher {' '.join(noted(began))}")
        return began
    options.notes = {TEACHERS: "".join(f"{line}\n" for line in noted(given))}
    return given


def noted(teachers: dict[str, Teacher]) -> list[str]:
    """Teachers as arguments that mean the same in any folder."""
    return [f"{domain}={teacher.folder.resolve()}:{teacher.weight!r}" for domain, teacher in sorted(teachers.items())]


def read_teachers(texts: Sequence[str]) -> dict[str, Teacher]:
    """Teachers by domain. ValueError for a domain with two."""
    found: dict[str, Teacher] = {}
    for domain, teacher in map(read_teacher, texts):
        if domain in found:
            raise ValueError(f"--teacher {domain} is {found[domain].folder} and {teacher.folder}; allowed: one")
        found[domain] = teacher
    return found


def read_teacher(text: str) -> tuple[str, Teacher]:
    """("domain", teacher) of "domain=folder:weight"; the weight is 1 if it is left out."""
    domain, mark, place = text.partition("=")
    folder, colon, weight = place.rpartition(":")
    if not mark or not domain or not place:
        raise ValueError(f"--teacher {text}; allowed: DOMAIN=FOLDER or DOMAIN=FOLDER:WEIGHT")
    try:
        number = float(weight) if colon else 1.0
    except ValueError:
        folder, number = place, 1.0
    return domain, Teacher(resolve_model(folder if colon and folder else Path(place)), number)


if __name__ == "__main__":
    sys.exit(main())
