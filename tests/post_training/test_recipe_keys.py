"""Keys of the recipes: defaults that are written once, what follows from others, partial rewards."""

from __future__ import annotations

import pytest

from dsv4.post_training.distillation import DistillationSettings
from dsv4.post_training.domains.code import CodeProblem
from dsv4.post_training.domains.instructions import Instructions
from dsv4.post_training.domains.registry import open_domain
from dsv4.post_training.episodes.environment import EpisodeLimits
from dsv4.post_training.grpo import GRPOSettings
from dsv4.post_training.grpo_run import GRPORunSettings
from dsv4.post_training.learner import LearnerSettings
from dsv4.post_training.policy_run import LoopSettings
from dsv4.post_training.recipes import DistillRecipe, GRPORecipe
from dsv4.post_training.replay import ReplaySettings
from dsv4.post_training.rewards import RewardSettings
from dsv4.training.recipe import read_recipe, write_recipe


def test_a_recipe_without_keys_has_the_defaults_of_the_settings() -> None:
    recipe, limits = GRPORecipe(), EpisodeLimits(tokens=2048)
    assert recipe.settings() == GRPORunSettings(
        LearnerSettings(GRPOSettings()), RewardSettings(), episodes=limits, replay=recipe.replay
    )
    assert recipe.loop() == LoopSettings(100, recipe.optimizer.schedule())
    assert DistillRecipe().settings() == DistillationSettings(episodes=limits)


@pytest.mark.parametrize(
    ("keys", "kept"),
    [
        ((), (True, True)),
        (("objective.mini_batches=1",), (False, False)),
        (("objective.mini_batches=1", "service.workers=2"), (False, False)),
        (("objective.mini_batches=1", "service.workers=2", "service.max_staleness=1"), (True, True)),
        (("objective.keep_routing=false",), (False, True)),
        (("objective.mini_batches=1", "objective.keep_indexer=true"), (False, True)),
    ],
)
def test_choices_are_kept_where_other_weights_than_those_that_sampled_learn(
    keys: tuple[str, ...], kept: tuple[bool, bool]
) -> None:
    recipe = read_recipe(GRPORecipe, None, keys)
    wanted = ReplaySettings(routing=kept[0], indexer=kept[1])
    assert recipe.replay == recipe.settings().replay == wanted == recipe.resolved().replay
    shown = write_recipe(recipe.resolved())
    for name, value in zip(("keep_routing", "keep_indexer"), kept, strict=True):
        assert f"{name} = {str(value).lower()}\n" in shown


@pytest.mark.parametrize("partial", [False, True])
def test_an_answer_that_is_right_in_part_may_have_a_part_of_the_reward(partial: bool) -> None:
    keys = ['problems.domains=["instructions", "tools"]', f"problems.partial={str(partial).lower()}"]
    source = read_recipe(GRPORecipe, None, keys).source()
    found = [problem for number in range(200) if isinstance(problem := source.problem(number), Instructions)]
    shares = {
        (place, answer): sum(one.holds(answer) for one in problem.constraints) / len(problem.constraints)
        for place, problem in enumerate(found) for answer in (problem.solution.upper(), problem.solution, "no")
    }  # fmt: skip
    assert {*shares.values()} > {0.0, 0.5, 1.0}
    for (place, answer), share in shares.items():
        assert found[place].reward(answer) == pytest.approx(share if partial else float(share == 1.0))
    code = open_domain("code", partial=partial).problem(1, 1)
    assert isinstance(code, CodeProblem) and code.partial == partial


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (['problems.domains=["tools"]'], "partial rewards of tools; allowed: code, instructions among them"),
        (['problems.tasks=["gcd"]'], "partial without domains; allowed: with problems.domains, or with tests in"),
    ],
)
def test_partial_rewards_that_nothing_has_are_refused(keys: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_recipe(GRPORecipe, None, [*keys, "problems.partial=true"]).source()
