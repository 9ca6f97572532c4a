"""Consistency of language: letters by writing system, of the reasoning if there is some; a penalty of the reward."""

from __future__ import annotations

import pytest
from deepseek_recipe import AssistantMessage, Conversation, SystemMessage, UserMessage

from dsv4.post_training.groups import Group, sampling_figures
from dsv4.post_training.language import consistency, question_of
from dsv4.post_training.recipes import GRPORecipe
from dsv4.post_training.rewards import RewardSettings, judge
from dsv4.post_training.rollouts import Rollout
from dsv4.training.recipe import read_recipe

from .small_policy import TextProblem, has_f


@pytest.mark.parametrize(
    ("question", "text", "share"),
    [
        ("What is it?", "It is so.", 1.0),
        ("What is it?", "It 是这样", 2 / 5),
        ("这是什么？", "这是 a cat", 2 / 6),
        ("これは何ですか", "これは猫です", 1.0),
        ("Wie heißt das? Größe", "Über fünf Äpfel", 1.0),
        ("Что это?", "Это cat", 3 / 6),
        ("What is it?", "这 is</think>这是这样", 2 / 3),  # of the reasoning
        ("这是什么？", "```python\nprint(1)\n```", 1.0),  # code has words of its own
        ("这是什么？", "这 <｜DSML｜tool_calls>look</｜DSML｜tool_calls> 是", 1.0),
        ("What is it?", "angle α, ½, ℝ and ｘ", 1.0),  # letters of mathematics
        ("How many?", "5 µm, 3 Ω, 2 Å, nº 5ª, xⁿ, ℎ, ℜ, ℵ", 1.0),  # of units, too
        ("Τι είναι αυτό;", "It is α", 1 / 5),  # Greek is a language of its own
        ("What is α + β?", "Είναι so", 1.0),  # and mathematics elsewhere
        ("東京は？", "東京はロンドンより大きいコンピュータ、々", 1.0),  # kana of both kinds, and their marks
        ("これは", "東京", 1.0),
        ("한국은?", "韓國은 カ", 3 / 4),
        ("这是什么？", "これは", 0.0),
        ("これは", "ｶﾀｶﾅ", 1.0),  # narrow ones
        ("これは", "ｺﾝﾋﾟｭｰﾀ ｶﾞ", 1.0),  # with marks of their own
        ("Is it?", "ŉ man", 1.0),
        ("这是什么？", "```\nIt is so</think>这", 0.0),  # no code, since it does not end
        ("这是什么？", "```\nprint(1)", 1.0),  # an answer that is cut in its code
        ("1 + 1 = ?", "这", 1.0),
        ("What is it?", "2", 1.0),
    ],
)
def test_share_of_the_letters_in_the_questions_writing_systems(question: str, text: str, share: float) -> None:
    assert consistency(question, text) == pytest.approx(share)


def test_the_question_is_the_users_last_message() -> None:
    asked = Conversation(
        [SystemMessage("Be brief."), UserMessage("Hi"), AssistantMessage("Hello"), UserMessage("这是什么？")]
    )
    assert question_of(asked) == "这是什么？" and question_of(Conversation([SystemMessage("x")])) == ""


def test_other_languages_cost_a_part_of_the_reward() -> None:
    problem = TextProblem(1, has_f)
    texts = ["of for", "of 是是", "是是是", "是是"]
    rollouts = [Rollout(0, (1,), (2,), (0.0,), text, text != "是是") for text in texts]
    rewards = judge(rollouts, [problem], RewardSettings(language=0.5, unfinished=-1.0))
    assert [reward.value for reward in rewards] == pytest.approx([1.0, 0.75, -0.5, -1.5])
    assert [reward.correct for reward in rewards] == [True, True, False, False]
    assert sampling_figures([Group(problem, rollouts, rewards)])["language"] == pytest.approx(0.375)
    assert "language" not in sampling_figures([Group(problem, rollouts, judge(rollouts, [problem]))])
    with pytest.raises(ValueError, match="language is -1; allowed: 0 or more"):
        RewardSettings(language=-1)


def test_the_recipe_has_its_weight() -> None:
    keys = ['problems.tasks=["gcd"]', "reward.language=0.25"]
    assert read_recipe(GRPORecipe, None, keys).settings().rewards.language == 0.25
