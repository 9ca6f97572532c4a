"""Teacher of a problem: that of its domain and effort, of its domain, or the default."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsv4.config import ModelConfig, nano_path
from dsv4.post_training.effort_names import Mode
from dsv4.post_training.efforts import EffortMode, with_effort
from dsv4.post_training.problem_keys import ProblemsSection
from dsv4.post_training.recipes import DistillRecipe
from dsv4.post_training.teachers import Teacher, Teachers
from dsv4.training.recipe import read_recipe

from .small_policy import TextProblem, has_f

VOCABULARY = ModelConfig.from_pretrained(nano_path()).vocab_size


def teachers(*names: str) -> Teachers:
    return Teachers(dict.fromkeys(names, Teacher(nano_path())), Path("hidden"), VOCABULARY)


@pytest.mark.parametrize(
    ("effort", "name"),
    [("low", "letters.low"), (75, "letters.75"), ("none", "letters.none"), ("max", "letters"), (None, "letters")],
)
def test_a_problem_has_the_teacher_of_its_effort_else_of_its_domain(effort: Mode | None, name: str) -> None:
    known = teachers("letters", "letters.low", "letters.75", "letters.none", "default", "low")
    problem = TextProblem(1, has_f)
    assert known.of(problem if effort is None else with_effort(problem, EffortMode(effort))) == name
    other = TextProblem(1, has_f, domain="numbers")
    assert known.of(other if effort is None else with_effort(other, EffortMode(effort))) == "default"


def test_problems_without_a_teacher_are_named_before_a_run() -> None:
    recipe = read_recipe(DistillRecipe, None, [
        'problems.tasks=["gcd", "number_sorting"]', 'problems.efforts=["none", "low"]',
        'problems.effort_domains=["gcd"]',
    ])  # fmt: skip
    asked = recipe.problems.asked_modes()
    assert asked == [("gcd", "none"), ("gcd", "low"), ("number_sorting", None)]
    teachers("gcd.none", "gcd.low", "number_sorting").check(asked, nano_path())
    for names, message in (
        (("gcd.low", "number_sorting"), r"no teacher for problems of gcd\.none; there are gcd\.low, number_sorting"),
        (("gcd", "number_sorting.low"), r"no teacher for problems of number_sorting; there are"),
        (("default", "gcd.lo"), r"no problem that is asked: gcd\.lo; allowed: default, gcd, gcd\.low, gcd\.none, num"),
        (("gcd", "gcd.none", "gcd.low", "default"), "teachers of no problem that is asked: gcd; allowed"),
    ):
        with pytest.raises(ValueError, match=message):
            teachers(*names).check(asked, nano_path())
    assert ProblemsSection(tasks=("gcd",)).asked_modes() == [("gcd", None)]
