"""GRPO's objective with the stabilizers of DeepSeek V3.2: pure functions of rewards and log-probabilities.

    maximize mean over answers i of 1/|y_i| sum_t [ M_i min(r A, clip(r, 1 - low, 1 + high) A) - beta KL_t ]

r = p / p_old of a token, A the answer's advantage within its group, KL_t an estimate of KL(policy || reference). M_i is
0 for a bad answer that the policy has drifted away from, else 1.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

AdvantageScale = Literal["none", "std"]
EQUAL = 1e-6  # rewards of a group that differ by less are equal: sums of terms differ by their rounding


@dataclass(frozen=True, kw_only=True)
class GRPOSettings:
    """Hyperparameters of the objective. The report gives none: "closely aligned" with R1 and V3.2."""

    clip_low: float = 0.2
    clip_high: float = 0.28  # higher than low: rare tokens may grow (DAPO); 0.2 is GRPO's
    kl: float = 0.0  # weight of the KL to the reference; R1's is 0.001
    unbiased_kl: bool = True  # times the importance ratio, V3.2
    off_policy_bound: float | None = 0.5  # mean log(p_old / p) above which a bad answer is dropped; V3.2: not disclosed
    advantage_scale: AdvantageScale = "none"  # V3.2: reward - mean; "std": R1's, over the standard deviation

    def __post_init__(self) -> None:
        if not 0.0 <= self.clip_low < 1.0:
            raise ValueError(f"clip_low is {self.clip_low}; allowed: 0 to below 1")
        if self.clip_high < 0.0:
            raise ValueError(f"clip_high is {self.clip_high}; allowed: 0 or more")
        if self.kl < 0.0:
            raise ValueError(f"kl is {self.kl}; allowed: 0 or more")
        if self.off_policy_bound is not None and not self.off_policy_bound > 0.0:
            raise ValueError(f"off_policy_bound is {self.off_policy_bound}; allowed: None, or more than 0")
        if self.advantage_scale not in ("none", "std"):
            raise ValueError(f"advantage_scale is {self.advantage_scale!r}; allowed: none, std")


@dataclass(frozen=True)
class Objective:
    """Loss to minimize, and figures of it for the log."""

    loss: Tensor
    kl: float  # mean estimate per token
    clipped: float  # share of tokens whose ratio is clipped
    dropped: int  # answers of the off-policy mask
    largest_difference: float  # |log p - log p_old| of a token; 0 where training computes what the sampler computed


def advantages(rewards: Sequence[float], groups: Sequence[Hashable], scale: AdvantageScale = "none") -> list[float]:
    """Rewards minus the mean of their group; with "std" over its standard deviation, 0 in a group of equal rewards.

    Rewards are equal as of `all_equal`. ValueError unless there is a group for each reward.
    """
    if len(rewards) != len(groups):
        raise ValueError(f"{len(rewards)} rewards for {len(groups)} answers; allowed: as many")
    members: dict[Hashable, list[int]] = {}
    for place, group in enumerate(groups):
        members.setdefault(group, []).append(place)
    found = [0.0] * len(rewards)
    for places in members.values():
        own = [rewards[place] for place in places]
        if all_equal(own):
            continue  # over a deviation of mere rounding, differences of rounding would be of size 1
        mean = math.fsum(own) / len(own)
        deviation = (math.fsum((reward - mean) ** 2 for reward in own) / len(own)) ** 0.5
        for place in places:
            found[place] = (rewards[place] - mean) / (deviation if scale == "std" else 1.0)
    return found


def all_equal(rewards: Sequence[float]) -> bool:
    """True if no two rewards differ by EQUAL or more, as where there is one, or none."""
    return not rewards or max(rewards) - min(rewards) < EQUAL


def grpo_loss(
    log_p: Tensor,
    log_p_old: Tensor,
    lengths: Sequence[int],
    advantage: Sequence[float],
    settings: GRPOSettings,
    log_p_reference: Tensor | None = None,
    answers: int | None = None,
) -> Objective:
    """Objective of answers whose tokens are laid end to end: `log_p`, `log_p_old` and `log_p_reference` fp32 [n].

    `lengths` are the answers' tokens, sum n; `advantage` one number per answer. `answers` is the number that the mean
    is over (those of all micro-batches of a step); None: these. Gradients reach `log_p` alone. ValueError for lengths
    that do not add up, an empty answer, or a KL weight without a reference.
    """
    _check(log_p, lengths, advantage, settings, log_p_reference)
    device = log_p.device
    sizes = torch.tensor(lengths, device=device)
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=device), sizes)
    weight = (1.0 / sizes.to(log_p.dtype) / (answers or len(lengths)))[owner]
    gain = log_p.new_tensor(advantage)
    log_p_old = log_p_old.detach()
    ratio = (log_p - log_p_old).exp()

    dropped = torch.zeros(len(lengths), dtype=torch.bool, device=device)
    if settings.off_policy_bound is not None:
        drift = log_p.new_zeros(len(lengths)).index_add_(0, owner, (log_p_old - log_p).detach()) / sizes
        dropped = (gain < 0) & (drift > settings.off_policy_bound)
    kept = (~dropped)[owner]

    gains = gain[owner]
    clipped = ratio.clamp(1.0 - settings.clip_low, 1.0 + settings.clip_high)
    surrogate = torch.minimum(ratio * gains, clipped * gains)
    divergence = torch.zeros_like(log_p)
    if log_p_reference is not None:
        log_r = log_p_reference.detach() - log_p
        divergence = log_r.exp() - log_r - 1.0
        if settings.unbiased_kl:
            divergence = ratio * divergence
    loss = -(weight * (kept * surrogate - settings.kl * divergence)).sum()
    difference = (log_p - log_p_old).detach().abs()
    return Objective(
        loss,
        kl=float(divergence.detach().mean()),
        clipped=float((ratio * gains > clipped * gains).float().mean()),
        dropped=int(dropped.sum()),
        largest_difference=float(difference.max()),
    )


def _check(
    log_p: Tensor,
    lengths: Sequence[int],
    advantage: Sequence[float],
    settings: GRPOSettings,
    log_p_reference: Tensor | None,
) -> None:
    if sum(lengths) != len(log_p) or min(lengths, default=0) < 1:
        raise ValueError(
            f"lengths are {list(lengths)} for {len(log_p)} tokens; allowed: 1 or more each, as many in all"
        )
    if len(advantage) != len(lengths):
        raise ValueError(f"{len(advantage)} advantages for {len(lengths)} answers; allowed: as many")
    if settings.kl and log_p_reference is None:
        raise ValueError(f"kl is {settings.kl}, but there is no reference policy; allowed: 0, or a reference")
