"""Rewards of many rollouts: in threads where problems say so, in the same order, and none costs the others anything."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest

from dsv4.post_training.efforts import EffortMode, with_effort
from dsv4.post_training.problems import Explained
from dsv4.post_training.rewards import RewardSettings, judge
from dsv4.post_training.rollouts import Rollout

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


def test_a_number_of_threads_below_0_is_named() -> None:
    with pytest.raises(ValueError, match="threads is -1; allowed: 0"):
        RewardSettings(threads=-1)
