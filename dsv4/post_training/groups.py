"""Groups of rollouts with their rewards, and the figures of a step's groups and updates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dsv4.post_training.efforts import BANDS, EffortProblem
from dsv4.post_training.grpo import all_equal
from dsv4.post_training.learner import Update
from dsv4.post_training.problems import Problem
from dsv4.post_training.rewards import Reward
from dsv4.post_training.rollouts import Sampled
from dsv4.post_training.rubric import JudgeQuestion


@dataclass(frozen=True)
class Asked:
    """Problems and the rollouts of each, whose `prompt` is the problem's place."""

    problems: list[Problem]
    rollouts: list[Sampled]


@dataclass(frozen=True)
class Group:
    """Rollouts of one problem and their rewards; those without a reward are left out."""

    problem: Problem
    rollouts: list[Sampled]
    rewards: list[Reward]
    stale: bool = False  # older than is allowed
    left_out: int = 0  # rollouts without a reward

    @property
    def informative(self) -> bool:
        """True if the rewards differ: else every advantage is 0. Stale rollouts are not trained on."""
        return not self.stale and not all_equal([reward.value for reward in self.rewards])


def sampling_figures(groups: Sequence[Group]) -> dict[str, Any]:
    """Figures of a step's rollouts, for the log."""
    rewards = [reward for group in groups for reward in group.rewards]
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    count = max(1, len(rewards))
    return (
        {
            "reward": sum(reward.value for reward in rewards) / count,
            "accuracy": sum(reward.correct for reward in rewards) / count,
            "answer_tokens": sum(rollout.num_tokens for rollout in rollouts) / count,
            "unfinished": sum(not rollout.finished for rollout in rollouts) / count,
            "groups": len(groups),
            "informative": sum(group.informative for group in groups),
            "left_out": sum(group.left_out for group in groups),
        }
        | _by_effort(groups)
        | _by_judge(groups, rewards)
        | _by_language(rewards)
    )


def _by_language(rewards: Sequence[Reward]) -> dict[str, float]:
    """language: mean share of the answers in their questions' languages."""
    shares = [reward.language for reward in rewards if reward.language is not None]
    return {"language": sum(shares) / len(shares)} if shares else {}


def _by_judge(groups: Sequence[Group], rewards: Sequence[Reward]) -> dict[str, float]:
    """Figures of the generative reward model.

    judge_reward: the judge's mean reward. known_reward: the mean true reward of the answers where one is known, and
    judge_excess: by how much the judge's is higher on the same answers; it grows where a policy learns to please the
    judge and not to be right. judging: mean agreement with the labels of labelled judgements.
    """
    found: dict[str, float] = {}
    by_rubric = [reward.by_rubric for reward in rewards if reward.by_rubric is not None]
    if by_rubric:
        found["judge_reward"] = sum(by_rubric) / len(by_rubric)
    both = [(one.by_rubric, one.known) for one in rewards if one.by_rubric is not None and one.known is not None]
    if both:
        found["known_reward"] = sum(known for _, known in both) / len(both)
        found["judge_excess"] = sum(judged - known for judged, known in both) / len(both)
    labelled = [
        reward.value for group in groups if isinstance(group.problem, JudgeQuestion) for reward in group.rewards
    ]
    if labelled:
        found["judging"] = sum(labelled) / len(labelled)
    return found


def _by_effort(groups: Sequence[Group]) -> dict[str, float]:
    """Accuracy and tokens of each level, or range of budgets, that was asked."""
    found: dict[str, float] = {}
    for effort in BANDS:
        chosen = [one for one in groups if isinstance(one.problem, EffortProblem) and one.problem.mode.band == effort]
        correct = [reward.correct for group in chosen for reward in group.rewards]
        tokens = [rollout.num_tokens for group in chosen for rollout in group.rollouts]
        if tokens:
            found[f"accuracy_{effort}"] = sum(correct) / len(correct)
            found[f"answer_tokens_{effort}"] = sum(tokens) / len(tokens)
    return found


def update_figures(updates: Sequence[Update]) -> dict[str, Any]:
    """Figures of a step's updates, without any there is nothing measured but their number.

    train_serve_difference is the first one's, whose weights sampled the rollouts.
    """
    if not updates:
        return {"updates": 0}
    mean = 1 / len(updates)
    return {
        "loss": mean * sum(one.loss for one in updates),
        "grad_norm": mean * sum(one.grad_norm for one in updates),
        "kl": mean * sum(one.kl for one in updates),
        "clipped": mean * sum(one.clipped for one in updates),
        "dropped": sum(one.dropped for one in updates),
        "updates": len(updates),
        "train_serve_difference": updates[0].largest_difference,
    }
