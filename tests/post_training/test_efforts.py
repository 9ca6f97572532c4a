"""Effort modes: prompt, window and penalty of each, in rollouts, rewards, episodes and whole runs."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from dsv4.config import nano_path
from dsv4.post_training.effort_names import EFFORTS, Asked, Mode, asked_efforts
from dsv4.post_training.efforts import (
    EffortMode,
    EffortProblem,
    EffortProblems,
    check_ladder,
    effort_of,
    penalty_of,
    window_of,
    with_effort,
)
from dsv4.post_training.groups import Group
from dsv4.post_training.grpo import GRPOSettings, advantages
from dsv4.post_training.grpo_run import GRPORun, GRPORunSettings
from dsv4.post_training.learner import LearnerSettings
from dsv4.post_training.policy_run import LoopSettings
from dsv4.post_training.problems import TaskProblems, answer_of
from dsv4.post_training.recipes import DistillRecipe, GRPORecipe
from dsv4.post_training.rewards import RewardSettings, judge
from dsv4.post_training.rollouts import Rollout
from dsv4.post_training.v4_recipe import V4Recipe
from dsv4.tokenizer.prompts import PromptEncoder, write_effort_ladder
from dsv4.training.recipe import read_recipe
from dsv4.training.schedule import Schedule

from .small_policy import TextProblem, TextProblems, has_f, small_policy

TASKS = 'problems.tasks=["gcd"]'
ALL = 'problems.efforts=["low", "high", "max"]'
BUDGETS = ('problems.efforts=["1-100"]', "efforts.penalty=budget")


def modes_of(*keys: str) -> dict[Mode, EffortMode]:
    return {mode.effort: mode for mode in read_recipe(GRPORecipe, None, [TASKS, ALL, *keys]).modes()}


def restated(tokens: int, window: float, free: float, most: float) -> float:
    """A mode's penalty, drawn as a line between two points."""
    if tokens <= free:
        return 0.0
    return -most if tokens >= window else -most * (tokens - free) / (window - free)


def test_modes_have_windows_and_penalties_of_their_own() -> None:
    found = modes_of("sampling.max_tokens=200", "efforts.low.length=0.3")
    wanted: dict[Mode, tuple[int, int, float]] = {"low": (50, 0, 0.3), "high": (100, 25, 0.5), "max": (200, 100, 0.5)}
    assert {effort: mode.window for effort, mode in found.items()} == {e: one[0] for e, one in wanted.items()}
    for effort, mode in found.items():
        assert mode.penalty is not None
        for tokens in (1, 24, 25, 26, 49, 50, 51, 99, 100, 101, 150, 200):
            assert mode.penalty(tokens) == pytest.approx(restated(tokens, *wanted[effort])), (effort, tokens)


def restated_scalar(tokens: int, budget: int, norm: float) -> float:
    """V4.1's penalty, its factor falling by 1/50 of itself per budget: e^(1/50) as a power."""
    return -min(0.5, 0.5 * (math.e ** (1 / 50)) ** (1 - budget) * tokens / norm)


def test_scalar_budgets_are_the_other_form() -> None:
    keys = ("sampling.max_tokens=200", "efforts.norm=0.5")
    levels = modes_of(*keys, "efforts.penalty=budget", "efforts.high.budget=60")  # which stand for their budgets
    drawn = modes_of(*keys, *BUDGETS)
    assert list(levels) == [50, 60, 100] and list(drawn) == list(range(1, 101))
    for budget, mode in (levels | drawn).items():
        assert mode.effort == budget and isinstance(budget, int) and mode.window is None and mode.penalty is not None
        for tokens in (1, 70, 200):
            assert mode.penalty(tokens) == pytest.approx(restated_scalar(tokens, budget, 100.0)), (budget, tokens)
    none = modes_of('efforts.penalty="none"')
    assert all(mode.penalty is None for mode in none.values()) and none["low"].window == 128
    some = modes_of('problems.efforts=[5, "20-21"]', "efforts.penalty=none")
    assert list(some.values()) == [EffortMode(5), EffortMode(20), EffortMode(21)]


def test_budgets_are_drawn_evenly_and_each_prompt_has_its_number(tmp_path: Path) -> None:
    recipe = read_recipe(GRPORecipe, None, [TASKS, *BUDGETS])
    source, prompts = recipe.source(), PromptEncoder.from_pretrained(nano_path())
    prompts = PromptEncoder(prompts.tokenizer, "scalar")
    problems = [source.problem(number) for number in range(1000)]
    drawn = [problem.mode.effort for problem in problems if isinstance(problem, EffortProblem)]
    assert {*drawn} == {*range(1, 101)} and max(drawn.count(budget) for budget in {*drawn}) < 30
    for problem, budget in zip(problems[:20], drawn, strict=False):
        assert f"Reasoning Effort: {budget} (range 1-100," in prompts.render(problem.prompt()).prompt
    student = read_recipe(DistillRecipe, None, [TASKS, BUDGETS[0]]).source()
    assert [student.problem(n).prompt().messages[0].content for n in range(9)] == [
        problem.prompt().messages[0].content for problem in problems[:9]
    ]
    assert [EffortMode(budget).band for budget in (1, 25, 26, 100)] == ["1-25", "1-25", "26-50", "76-100"]


@pytest.mark.parametrize("effort", [0, 101, "0-5", "50-20", "1-101", "medium", -3])
def test_other_efforts_are_refused_in_words(effort: str | int) -> None:
    message = f"problems.efforts.0 is {effort!r}: effort is {effort!r}; allowed: none, low, high, max, a budget"
    with pytest.raises(ValueError, match=message):
        read_recipe(GRPORecipe, None, [TASKS, f"problems.efforts=[{json.dumps(effort)}]"])
    with pytest.raises(ValueError, match="efforts.penalty is mode, and problems.efforts has budgets"):
        read_recipe(GRPORecipe, None, [TASKS, BUDGETS[0]])


def test_a_small_budget_prefers_the_shorter_of_two_right_answers_more_than_a_large_one() -> None:
    """Advantages are within the answers to one problem under one budget; restated from its numbers."""
    modes = modes_of("sampling.max_tokens=64", *BUDGETS)
    gains: dict[int, float] = {}
    for budget in (1, 25, 75, 100):
        problem = with_effort(TextProblem(1, has_f), modes[budget])
        rollouts = [Rollout(0, (1,), (2,) * n, (0.0,) * n, "if", True) for n in (8, 32)]
        rewards = judge(rollouts, [problem])
        found = advantages([one.value for one in rewards], [0, 0], "none")
        half = (restated_scalar(8, budget, 64.0) - restated_scalar(32, budget, 64.0)) / 2
        assert list(found) == pytest.approx([half, -half])
        gains[budget] = half
        wrong = judge([Rollout(0, (1,), (2,), (0.0,), "a", True)], [problem])[0]
        assert min(one.value for one in rewards) > wrong.value
    assert gains[1] > gains[25] > gains[75] > gains[100] > 0.0


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
    with pytest.raises(
        ValueError, match=r"efforts\.low\.window without efforts that are asked; allowed: with problems"
    ):
        read_recipe(GRPORecipe, None, [TASKS, "efforts.low.window=0.1"]).source()


def test_answers_without_thinking_have_a_window_and_a_penalty_of_their_own() -> None:
    keys = (TASKS, 'problems.efforts=["none", "low"]', "sampling.max_tokens=200")
    recipe = read_recipe(GRPORecipe, None, [*keys, "efforts.none.window=0.1", "efforts.none.length=0.2"])
    without, low = recipe.modes()
    assert (without.effort, without.window, low.effort, low.window) == ("none", 20, "low", 50)
    assert without.penalty is not None and low.penalty is not None
    assert [without.penalty(tokens) for tokens in (10, 15, 20)] == pytest.approx([0.0, -0.1, -0.2])
    budgets = read_recipe(GRPORecipe, None, [*keys, "problems.efforts=['none', 7]", "efforts.penalty=budget"])
    assert [mode.window for mode in budgets.modes()] == [50, None]
    source, prompts = recipe.source(), PromptEncoder(PromptEncoder.from_pretrained(nano_path()).tokenizer, "0731")
    plain = read_recipe(GRPORecipe, None, [TASKS, "problems.thinking=false"]).source()
    asked = [(number, source.problem(number)) for number in range(40)]
    assert {problem.thinking for _, problem in asked} == {True, False}
    for number, problem in asked:
        ends = prompts.render(problem.prompt()).prompt.endswith("</think>")
        assert ends == (not problem.thinking) == (effort_of(problem) == "none")
        if not problem.thinking:
            assert prompts.encode(problem.prompt()) == prompts.encode(plain.problem(number).prompt())
            assert answer_of("an answer", problem.thinking) == "an answer"
    assert effort_of(plain.problem(1)) is None
    check_ladder(nano_path(), ["none", "low"])
    student = read_recipe(DistillRecipe, None, keys[:2]).source()
    assert [student.problem(number).thinking for number, _ in asked] == [problem.thinking for _, problem in asked]


def test_modes_that_contradict_thinking_are_refused() -> None:
    for keys, message in (
        (["problems.thinking=false", 'problems.efforts=["none", "low"]'], "efforts low without thinking"),
        (["problems.thinking=true", 'problems.efforts=["none", "low"]'], "efforts none with thinking"),
    ):
        with pytest.raises(ValueError, match=f"{message}; allowed: thinking left out"):
            read_recipe(GRPORecipe, None, [TASKS, *keys])
    with pytest.raises(ValueError, match="specialists.code.efforts.0 is 'none': .*; allowed: low, high, max"):
        read_recipe(V4Recipe, None, ['specialists.code.efforts=["none"]'])


def test_a_share_of_the_tasks_problems_has_thinking() -> None:
    tasks = 'problems.tasks=["gcd", "chain_sum"]'

    def thinking(*keys: str) -> list[bool]:
        source = read_recipe(DistillRecipe, None, [tasks, *keys]).source()
        return [source.problem(number).thinking for number in range(300) if source.problem(number).domain != "code"]

    found = thinking("problems.thinking_share=0.25")
    assert found == thinking("problems.thinking_share=0.25") and 50 < sum(found) < 100
    assert all(thinking("problems.thinking_share=1")) and not any(thinking("problems.thinking_share=0"))
    domains = 'problems.domains=["code"]'
    beside = thinking("problems.thinking_share=0.25", domains)
    assert 0.15 < sum(beside) / len(beside) < 0.35
    with pytest.raises(ValueError, match="thinking_share is 0.25 beside thinking; allowed: one of them"):
        thinking("problems.thinking_share=0.25", "problems.thinking=true")
    with pytest.raises(ValueError, match="thinking_share"):
        thinking("problems.thinking_share=1.5")


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
    cases: list[tuple[Asked, tuple[int, int]]] = [("low", (4, 12)), ("max", (4, 31)), ("max", (4, 48))]
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
    modes = (EffortMode("none", 2), EffortMode("low", 3, lambda tokens: -0.1 * tokens), EffortMode("max", 7))
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
    assert [line[f"answer_tokens_{effort}"] for effort in ("none", "low", "max")] == [2.0, 3.0, 6.0]
    assert "accuracy_low" in line and "answer_tokens_high" not in line


def test_a_run_of_budgets_has_one_window_and_one_budget_in_a_group(tmp_path: Path) -> None:
    policy, optimizer = small_policy()
    modes = tuple(modes_of("sampling.max_tokens=6", "problems.efforts=[1, 100]", "efforts.penalty=budget").values())
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
    assert line["answer_tokens_1-25"] == line["answer_tokens_76-100"] == 6.0
    assert "accuracy_1-25" in line and "answer_tokens_26-50" not in line
    rewards = {"1-25": restated_scalar(6, 1, 6.0), "76-100": restated_scalar(6, 100, 6.0)}
    asked = map(run.problems.problem, range(8))
    counts = [problem.mode.band for problem in asked if isinstance(problem, EffortProblem)]
    penalty = sum(rewards[band] for band in counts) / len(counts)
    right = sum(line[f"accuracy_{band}"] * counts.count(band) for band in rewards) / len(counts)
    assert line["reward"] == pytest.approx(right + penalty)


def test_efforts_that_read_alike_are_refused(tmp_path: Path) -> None:
    for path in nano_path().glob("*.json"):
        shutil.copy(path, tmp_path)
    write_effort_ladder(tmp_path, "preview")
    with pytest.raises(ValueError, match=r"efforts low and high have the same prompt under the ladder preview .*0731"):
        check_ladder(tmp_path, EFFORTS)
    check_ladder(tmp_path, ("low", "max"))
    write_effort_ladder(tmp_path, "0731")
    check_ladder(tmp_path, EFFORTS)
    prompts = PromptEncoder.from_pretrained(tmp_path)
    problem = TaskProblems({"gcd": 1.0}, thinking_share=1.0).problem(1)
    assert len({prompts.render(with_effort(problem, EffortMode(one)).prompt()).prompt for one in EFFORTS}) == 3
    with pytest.raises(ValueError, match=r"efforts are budgets, and the ladder of .* is 0731; allowed: .*scalar"):
        check_ladder(tmp_path, (50, 60))
    write_effort_ladder(tmp_path, "scalar")
    check_ladder(tmp_path, (*EFFORTS, *asked_efforts(["1-49"])))
    with pytest.raises(ValueError, match=r"efforts high and 75 have the same prompt"):
        check_ladder(tmp_path, (*EFFORTS, 75))
