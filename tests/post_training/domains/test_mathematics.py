"""Mathematics: grouped tasks; other forms of the right number count, expressions do not."""

from __future__ import annotations

import logging
import re

import pytest

from dsv4 import notices
from dsv4.data.tasks import split_of
from dsv4.post_training.domains import mathematics
from dsv4.post_training.domains.domain import LEVELS, Level
from dsv4.post_training.domains.mathematics import NUMBERS, Mathematics, MathProblem, same_number


def test_problems_are_pure_split_and_right_by_their_own_answers() -> None:
    domain, tasks = Mathematics(), set[str]()
    for split in ("train", "eval"):
        for number in range(40):
            one = domain.problem(1, number, split)
            assert isinstance(one, MathProblem) and one.domain == "mathematics"
            assert split_of(one.key) == split
            assert one.reward(one.example.answer) == 1.0 and one.reward("no idea") == 0.0
            tasks.add(one.task)
    assert domain.problem(1, 3) == domain.problem(1, 3)
    assert tasks == set(NUMBERS)
    assert Mathematics(thinking=True).problem(1, 3).thinking


@pytest.mark.parametrize("level", LEVELS)
def test_problems_are_wider_than_the_tasks(level: Level) -> None:
    for task, of, bound, own in (("gcd", _largest, {"easy": 60}, 40), ("chain_sum", _terms, {"easy": 4}, 3)):
        domain = Mathematics(tasks=(task,), level=level)
        problems = [domain.problem(2, number, "eval") for number in range(40)]
        assert own < max(of(problem.key) for problem in problems) <= bound.get(level, 1000)
        for problem in problems:
            assert isinstance(problem, MathProblem) and problem.reward(problem.example.answer) == 1.0


def _largest(key: str) -> int:
    return max(map(int, re.findall(r"\d+", key)))


def _terms(key: str) -> int:
    return len(re.findall(r"\d+", key))


@pytest.mark.parametrize(
    "answer",
    ["7", "7.0", "x = 7", "\\boxed{7}", "$7$", "$7", "7 apples", "7 minutes", "7 times", "The answer is 7",
     "The answer is 7.", "Note that nothing is left of the halves, so: 7"],
)  # fmt: skip
def test_other_forms_of_a_number(answer: str) -> None:
    pytest.importorskip("math_verify")
    assert same_number("7", answer)
    assert not same_number("8", answer) and not same_number("-7", answer)


@pytest.mark.parametrize(
    "answer",
    ["3+4", "14/2", "8-1", "7 or 8", "-7", "- 7", "7!", "\\sqrt{49}", "9^9^9^9", "", "seven", "7" * 300, "-(7)", "x-7",
     "7%", "7i", "minus 7", "Minus 7", "negative 7", "not 7", "It isn't 7", "It isn’t 7", "x≠ 7", "x ≠ 7", "−7",
     "7 hundred", "7 thousand", "7 million", "7 Billions", "7 dozen", "7 percent", "7 and a half", "7 ½", "7 squared"],
)  # fmt: skip
def test_expressions_and_other_answers_do_not_count(answer: str) -> None:
    assert not same_number("7", answer)


def test_without_math_verify_it_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(mathematics, "find_spec", lambda _: None)
    monkeypatch.setattr(notices, "_told", set())
    mathematics._verifier.cache_clear()
    with caplog.at_level(logging.WARNING):
        Mathematics().prepare()
        Mathematics().prepare()
    assert len([line for line in caplog.messages if "math-verify" in line]) == 1
    assert not same_number("7", "7.0")
    mathematics._verifier.cache_clear()
