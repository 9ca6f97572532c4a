"""Effort modes: prompt, window and penalty of each, in rollouts, rewards, episodes and whole runs."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from dsv4.config import nano_path
from dsv4.data.tasks import Effort
from dsv4.post_training.efforts import (
    EFFORTS,
    EffortMode,
    EffortProblems,
    check_ladder,
    penalty_of,
    window_of,
    with_effort,
)
from dsv4.post_training.groups import Group
from dsv4.post_training.grpo import GRPOSettings, advantages
from dsv4.post_training.grpo_run import GRPORun, GRPORunSettings
from dsv4.post_training.learner import LearnerSettings
from dsv4.post_training.policy_run import LoopSettings
from dsv4.post_training.problems import TaskProblems
from dsv4.post_training.recipes import DistillRecipe, GRPORecipe
from dsv4.post_training.rewards import RewardSettings, judge
from dsv4.post_training.rollouts import Rollout
from dsv4.tokenizer.prompts import PromptEncoder, write_effort_ladder
from dsv4.training.recipe import read_recipe
from dsv4.training.schedule import Schedule

from .small_policy import TextProblem, TextProblems, has_f, small_policy

TASKS = 'problems.tasks=["gcd"]'
ALL = 'problems.efforts=["low", "high", "max"]'


def modes_of(*keys: str) -> dict[Effort, EffortMode]:
    return {mode.effort: mode for mode in read_recipe(GRPORecipe, None, [TASKS, ALL, *keys]).modes()}


def restated(tokens: int, window: float, free: float, most: float) -> float:
    """A mode's penalty, drawn as a line between two points."""
    if tokens <= free:
        return 0.0
    return -most if tokens >= window else -most * (tokens - free) / (window - free)


def test_modes_have_windows_and_penalties_of_their_own() -> None:
    found = modes_of("sampling.max_tokens=200", "efforts.low.length=0.3")
    wanted = {"low": (50, 0, 0.3), "high": (100, 25, 0.5), "max": (200, 100, 0.5)}
    assert {effort: mode.window for effort, mode in found.items()} == {e: one[0] for e, one in wanted.items()}
    for effort, mode in found.items():
        assert mode.penalty is not None
        for tokens in (1, 24, 25, 26, 49, 50, 51, 99, 100, 101, 150, 200):
            assert mode.penalty(tokens) == pytest.approx(restated(tokens, *wanted[effort])), (effort, tokens)


def test_scalar_budgets_are_the_other_form() -> None:
    keys = ("sampling.max_tokens=200", 'efforts.penalty="budget"', "efforts.norm=0.5", "efforts.high.budget=60")
    found = modes_of(*keys)
    budgets: dict[Effort, int] = {"low": 50, "high": 60, "max": 100}
    for effort, budget in budgets.items():
        penalty = found[effort].penalty
        assert penalty is not None
        for tokens in (1, 70, 200):
            wanted = -min(0.5, 0.5 * math.exp(-(budget - 1) / 50) * tokens / 100)
            assert penalty(tokens) == pytest.approx(wanted)
    none = modes_of('efforts.penalty="none"')
    assert all(mode.penalty is None for mode in none.values()) and none["low"].window == 128


def test_recipes_ask_with_efforts_and_refuse_what_contradicts_them() -> None:
    source = read_recipe(GRPORecipe, None, [TASKS, ALL]).source()
    problems = [source.problem(number) for number in range(40)]
    assert {problem.prompt().reasoning_effort for problem in problems} == set(EFFORTS)
    assert all(problem.thinking for problem in problems)
    assert problems == [source.problem(number) for number in range(40)]
    assert read_recipe(DistillRecipe, None, [TASKS, ALL]).source().problem(3).prompt().reasoning_effort in EFFORTS
    assert read_recipe(GRPORecipe, None, [TASKS]).source().problem(3).prompt().reasoning_effort
    with pytest.raises(ValueError, match="efforts low, high, max without thinking"):
        read_recipe(GRPORecipe, None, [TASKS, ALL, "problems.thinking=false"])
    with pytest.raises(ValueError, match="effort_domains has gdc, which is not asked; allowed: gcd"):
        read_recipe(GRPORecipe, None, [TASKS, ALL, 'problems.effort_domains=["gdc"]'])
    with pytest.raises(ValueError, match="effort_domains is gcd without efforts"):
        read_recipe(GRPORecipe, None, [TASKS, 'problems.effort_domains=["gcd"]'])
    with pytest.raises(ValueError, match=r"reward.length is 0.1 with efforts"):
        read_recipe(GRPORecipe, None, [TASKS, ALL, "reward.length=0.1"])
    with pytest.raises(ValueError, match="problems.efforts.0"):
        read_recipe(GRPORecipe, None, [TASKS, 'problems.efforts=["medium"]'])


def test_rewards_have_the_penalty_of_the_problem_s_effort() -> None:
    mode = EffortMode("low", 10, lambda tokens: -0.1 * tokens)
    asked = [with_effort(TextProblem(1, has_f), mode), TextProblem(1, has_f)]
    rollouts = [Rollout(place, (1,), (2, 2, 2), (0.0,) * 3, "if", True) for place in (0, 1)]
    cut_off = replace(rollouts[0], finished=False)
    found = judge([*rollouts, cut_off], asked, RewardSettings(unfinished=-0.5))
    assert [one.value for one in found] == pytest.approx([0.7, 1.0, -0.8])
    assert [one.correct for one in found] == [True, True, False]
    assert (window_of(asked[0], 64), window_of(asked[0], 4), window_of(asked[1], 64)) == (10, 4, 64)
    assert penalty_of(asked[1], 3) == 0.0


def test_low_prefers_the_shorter_of_two_right_answers_and_max_leaves_both_alone() -> None:
    found = modes_of("sampling.max_tokens=64")
    cases: list[tuple[Effort, tuple[int, int]]] = [("low", (4, 12)), ("max", (4, 31)), ("max", (4, 48))]
    for effort, lengths in cases:
        problem = with_effort(TextProblem(1, has_f), found[effort])
        rollouts = [Rollout(0, (1,), (2,) * n, (0.0,) * n, "if", True) for n in lengths]
        rewards = judge(rollouts, [problem])
        gains = advantages([one.value for one in rewards], [0, 0], "none")
        assert all(one.correct for one in rewards)
        if lengths == (4, 31):  # max is free up to half of its window
            assert not Group(problem, list(rollouts), rewards).informative and list(gains) == [0.0, 0.0]
        else:
            assert gains[0] > 0.0 > gains[1]
        wrong = judge([Rollout(0, (1,), (2,), (0.0,), "a", True)], [problem])[0]
        assert min(one.value for one in rewards) > wrong.value  # long and right is above short and wrong


def test_a_run_samples_within_each_window_and_says_what_each_effort_does(tmp_path: Path) -> None:
    policy, optimizer = small_policy()
    modes = (EffortMode("low", 3, lambda tokens: -0.1 * tokens), EffortMode("max", 7))
    run = GRPORun(
        policy, optimizer, EffortProblems(TextProblems(has_f), modes),
        LoopSettings(steps=1, schedule=Schedule(0.01, 0, 0.0), prompts=8, max_tokens=6),
        GRPORunSettings(
            LearnerSettings(GRPOSettings(kl=0.0)), RewardSettings(judge_cut_off=True), group_size=2, resample=1
        ),
        tmp_path, quiet=True,
    )  # fmt: skip
    run.run()
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["answer_tokens_low"] == 3.0 and line["answer_tokens_max"] == 6.0
    assert "accuracy_low" in line and "answer_tokens_high" not in line


def test_efforts_that_read_alike_are_refused(tmp_path: Path) -> None:
    for path in nano_path().glob("*.json"):
        shutil.copy(path, tmp_path)
    with pytest.raises(ValueError, match=r"efforts low and high have the same prompt under the ladder preview .*0731"):
        check_ladder(tmp_path, EFFORTS)
    check_ladder(tmp_path, ("low", "max"))
    write_effort_ladder(tmp_path, "0731")
    check_ladder(tmp_path, EFFORTS)
    prompts = PromptEncoder.from_pretrained(tmp_path)
    problem = TaskProblems({"gcd": 1.0}, thinking=True).problem(1)
    assert len({prompts.render(with_effort(problem, EffortMode(one)).prompt()).prompt for one in EFFORTS}) == 3
