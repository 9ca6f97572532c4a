"""GRPO's objective and its gradient against a slow restatement, token by token; advantages."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dsv4.post_training.groups import Group
from dsv4.post_training.grpo import EQUAL, GRPOSettings, advantages, grpo_loss
from dsv4.post_training.rewards import Reward
from dsv4.post_training.rollouts import Rollout

from .small_policy import TextProblem, has_f

LENGTHS = (1, 4, 7, 3, 128)
GAINS = (0.5, -1.0, 0.0, -0.25, 2.0)


def policies() -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the policy, of the sampling one and of the reference, in double precision."""
    g = torch.Generator().manual_seed(3)
    count = sum(LENGTHS)
    old = -torch.rand(count, generator=g, dtype=torch.float64) * 3 - 0.1
    new = old + torch.randn(count, generator=g, dtype=torch.float64) * 0.4
    start = LENGTHS[0]
    new[start : start + LENGTHS[1]] = old[start : start + LENGTHS[1]] - 0.9  # a bad answer that has become unlikely
    return new, old, old + torch.randn(count, generator=g, dtype=torch.float64) * 0.3


def restated(new: list[float], old: list[float], ref: list[float], settings: GRPOSettings) -> tuple[float, list[float]]:
    """Loss and its gradient by the formula of each token, in Python numbers."""
    loss, gradient, at = 0.0, [0.0] * len(new), 0
    for length, gain in zip(LENGTHS, GAINS, strict=True):
        tokens = range(at, at + length)
        at += length
        drift = sum(old[t] - new[t] for t in tokens) / length
        dropped = settings.off_policy_bound is not None and gain < 0 and drift > settings.off_policy_bound
        for t in tokens:
            weight = 1 / (length * len(LENGTHS))
            ratio = math.exp(new[t] - old[t])
            bounded = min(max(ratio, 1 - settings.clip_low), 1 + settings.clip_high)
            term, slope = ratio * gain, ratio * gain
            if bounded * gain < ratio * gain:
                term, slope = bounded * gain, 0.0
            if dropped:
                term, slope = 0.0, 0.0
            log_r = ref[t] - new[t]
            k3 = math.exp(log_r) - log_r - 1
            k3_slope = 1 - math.exp(log_r)
            if settings.unbiased_kl:
                k3, k3_slope = ratio * k3, ratio * (k3 + k3_slope)
            loss -= weight * (term - settings.kl * k3)
            gradient[t] = -weight * (slope - settings.kl * k3_slope)
    return loss, gradient


@pytest.mark.parametrize("bound", [None, 0.5])
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize(("low", "high", "kl"), [(0.2, 0.28, 0.0), (0.2, 0.2, 0.1), (0.0, 10.0, 1.0)])
def test_loss_and_gradient_are_those_of_the_formula(
    low: float, high: float, kl: float, unbiased: bool, bound: float | None
) -> None:
    settings = GRPOSettings(clip_low=low, clip_high=high, kl=kl, unbiased_kl=unbiased, off_policy_bound=bound)
    new, old, ref = policies()
    new.requires_grad_()
    got = grpo_loss(new, old, LENGTHS, GAINS, settings, ref)
    got.loss.backward()
    loss, gradient = restated(new.tolist(), old.tolist(), ref.tolist(), settings)
    assert float(got.loss.detach()) == pytest.approx(loss, rel=1e-6)
    assert new.grad is not None and new.grad.tolist() == pytest.approx(gradient, rel=1e-5, abs=1e-9)
    assert got.dropped == (0 if bound is None else 1)


def test_on_policy_the_gradient_is_that_of_the_policy_gradient() -> None:
    _, old, _ = policies()
    new = old.clone().requires_grad_()
    got = grpo_loss(new, old, LENGTHS, GAINS, GRPOSettings(kl=0.0))
    got.loss.backward()
    want = [-gain / length / len(LENGTHS) for length, gain in zip(LENGTHS, GAINS, strict=True) for _ in range(length)]
    assert new.grad is not None and new.grad.tolist() == pytest.approx(want)
    assert got.largest_difference == 0.0 and got.clipped == 0.0


def test_micro_batches_add_up_to_the_whole_step() -> None:
    new, old, ref = policies()
    settings = GRPOSettings(kl=0.1)
    whole = grpo_loss(new, old, LENGTHS, GAINS, settings, ref).loss
    cut = sum(LENGTHS[:2])
    first = grpo_loss(new[:cut], old[:cut], LENGTHS[:2], GAINS[:2], settings, ref[:cut], len(LENGTHS)).loss
    second = grpo_loss(new[cut:], old[cut:], LENGTHS[2:], GAINS[2:], settings, ref[cut:], len(LENGTHS)).loss
    assert float((first + second).detach()) == pytest.approx(float(whole.detach()))


def test_advantages_are_within_the_group() -> None:
    rewards, groups = [1.0, 0.0, 5.0, 5.0, 2.0], ["a", "a", "b", "b", "c"]
    assert advantages(rewards, groups) == [0.5, -0.5, 0.0, 0.0, 0.0]
    assert advantages(rewards, groups, "std") == [1.0, -1.0, 0.0, 0.0, 0.0]


def test_rewards_that_differ_by_their_rounding_are_equal() -> None:
    """Over a standard deviation of rounding, such differences would be advantages of size 1."""
    rounded = [0.7 - 0.1, 0.8 - 0.2, 0.8 - 0.2, 0.7 - 0.1]
    assert len({*rounded}) > 1
    for rewards in (rounded, [0.1] * 3, [0.5, 0.5 + EQUAL / 2], [2.0], []):
        assert advantages(rewards, ["a"] * len(rewards), "std") == [0.0] * len(rewards)
        problem, rollout = TextProblem(1, has_f), Rollout(0, (1,), (2,), (0.0,), "", True)
        assert not Group(problem, [rollout] * len(rewards), [Reward(value, False) for value in rewards]).informative
    assert advantages([0.5, 0.5 + 4 * EQUAL], ["a"] * 2, "std") == pytest.approx([-1.0, 1.0])


def test_advantages_do_not_depend_on_the_order_of_the_answers() -> None:
    rewards = [0.1, 0.2, 0.3]
    assert sum(rewards) != sum(reversed(rewards))
    for scale in ("none", "std"):
        assert advantages(rewards, ["a"] * 3, scale) == advantages(rewards[::-1], ["a"] * 3, scale)[::-1]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("clip_low", 1.0, "clip_low is 1.0; allowed: 0 to below 1"),
        ("kl", -0.1, "kl is -0.1; allowed: 0 or more"),
        ("off_policy_bound", 0.0, "off_policy_bound is 0.0; allowed: None, or more than 0"),
        ("advantage_scale", "mean", "advantage_scale is 'mean'; allowed: none, std"),
    ],
)
def test_settings_that_are_not_allowed_are_named(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(GRPOSettings(), **{field: value})  # pyright: ignore[reportArgumentType]


def test_a_kl_without_a_reference_is_an_error() -> None:
    new, old, _ = policies()
    with pytest.raises(ValueError, match="there is no reference policy"):
        grpo_loss(new, old, LENGTHS, GAINS, GRPOSettings(kl=0.1))


def test_lengths_that_do_not_add_up_are_an_error() -> None:
    new, old, _ = policies()
    with pytest.raises(ValueError, match="for 142 tokens"):
        grpo_loss(new[:-1], old[:-1], LENGTHS, GAINS, GRPOSettings(kl=0.0))
