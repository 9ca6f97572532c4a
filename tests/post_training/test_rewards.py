"""Rewards of many rollouts: in threads where problems say so, in the same order, and none costs the others anything."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest

from dsv4.post_training.efforts import EffortMode, with_effort
from dsv4.post_training.problems import Explained
from dsv4.post_training.recipes import GRPORecipe
from dsv4.post_training.rewards import RewardSettings, judge
from dsv4.post_training.rollouts import Rollout
from dsv4.training.recipe import read_recipe

from .small_policy import TextProblem

AT_ONCE = 3
PATIENCE = 60.0  # seconds


@dataclass(frozen=True)
class Slow(TextProblem):
    """A problem whose judging waits, as for a program."""

    parallel: ClassVar[bool] = True

    def explain(self, answer: str) -> Explained:
        return Explained(self.judged(answer), f"read {answer}")


def rollouts(*texts: str, error: str | None = None) -> list[Rollout]:
    return [Rollout(0, (1,), (2,), (0.0,), text, True, error=error) for text in texts]


@pytest.mark.parametrize("effort", [False, True])
def test_answers_are_judged_at_the_same_time_and_rewards_keep_their_order(effort: bool) -> None:
    together, later = threading.Barrier(AT_ONCE), threading.Event()

    def judged(answer: str) -> float:
        together.wait(PATIENCE)  # raises unless AT_ONCE threads come
        if answer == "0":
            assert later.wait(PATIENCE)  # the first is done last
        if answer == str(AT_ONCE - 1):
            later.set()
        if answer == "1":
            raise OSError("the sandbox is lost")
        return float(answer)

    problem = Slow(0, judged)
    asked = with_effort(problem, EffortMode("low")) if effort else problem
    found = judge(rollouts(*map(str, range(AT_ONCE))), [asked], RewardSettings(threads=AT_ONCE))
    assert [reward.value for reward in found] == [0.0, 0.0, 2.0]
    assert [reward.reason for reward in found] == ["read 0", "", "read 2"]
    assert [reward.error for reward in found] == [
        None, "the reward of letters raised OSError: the sandbox is lost", None
    ]  # fmt: skip


@pytest.mark.parametrize("make", [TextProblem, lambda *one: with_effort(TextProblem(*one), EffortMode("low"))])
def test_other_problems_are_judged_in_the_callers_thread(make: Callable[..., TextProblem]) -> None:
    seen: list[threading.Thread] = []

    def judged(answer: str) -> float:
        seen.append(threading.current_thread())
        return 1.0

    judge(rollouts("a", "b"), [make(0, judged)], RewardSettings(threads=2))
    assert seen == [threading.main_thread()] * 2


def test_a_failed_rollout_is_not_judged() -> None:
    (reward,) = judge(rollouts("a", error="a rollout failed: out of pages"), [Slow(0, lambda _: 1 / 0)])
    assert reward.error == "a rollout failed: out of pages"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threads": -1}, "threads is -1; allowed: 0"),
        ({"unfinished": math.nan}, "unfinished is nan; allowed: a finite number"),
        ({"unfinished": -math.inf}, "unfinished is -inf; allowed: a finite number"),
    ],
)
def test_settings_that_are_not_allowed_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardSettings(**settings)


@pytest.mark.parametrize(
    "key", ["reward.unfinished=nan", "reward.length=inf", "efforts.k0=inf", "efforts.none.length=inf"]
)
def test_keys_of_rewards_are_finite(key: str) -> None:
    with pytest.raises(ValueError, match=key.partition("=")[0]):
        read_recipe(GRPORecipe, None, [key])


def penalty(tokens: int) -> float:
    """Of the user: it knows no answer of 3 tokens, none has 4, and 5 are too many to add up."""
    return {1: 0.0, 2: -0.25, 4: math.nan, 5: -1e308}[tokens]


@pytest.mark.parametrize("by_effort", [False, True])
@pytest.mark.parametrize("finished", [False, True])
def test_a_penalty_that_raises_or_is_no_number_costs_its_rollout_alone(by_effort: bool, finished: bool) -> None:
    given = [replace(one, token_ids=(2,) * n, finished=finished) for n, one in enumerate(rollouts(*"fffff"), 1)]
    problem = TextProblem(0, lambda _: 1.0 if by_effort else -1e308)
    asked = with_effort(problem, EffortMode("low", penalty=penalty)) if by_effort else problem
    settings = RewardSettings(unfinished=0.5) if by_effort else RewardSettings(unfinished=-1e308, length=penalty)
    none, some, raises, nan, most = judge(given, [asked], settings)
    base = problem.reward("f") if finished else settings.unfinished
    assert [one.value for one in (none, some)] == [base, base - 0.25] and none.error is some.error is None
    assert raises.error == "the length penalty of letters raised KeyError: 3"
    assert nan.error == "the reward of letters with its length penalty is nan; allowed: a finite number"
    if by_effort:
        assert most.error is None
    else:
        assert most.error == "the reward of letters with its length penalty is -inf; allowed: a finite number"
