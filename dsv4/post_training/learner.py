"""Updates of a policy from judged rollouts: micro-batches by tokens, the stored weights' values in the forward."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from dsv4.analysis.activations import Recompute
from dsv4.model.aux_losses import AuxLosses
from dsv4.model.transformer import Transformer
from dsv4.post_training.grpo import GRPOSettings, Objective, grpo_loss
from dsv4.post_training.replay import replaying
from dsv4.post_training.rollouts import Sampled, answer_log_probabilities, packed
from dsv4.training.optim import MuonAdamW
from dsv4.training.qat import stored_weights
from dsv4.training.recompute import recomputing

S = TypeVar("S", bound=Sampled)


@dataclass(frozen=True)
class Judged:
    """A rollout and its advantage; `reference` are its tokens' log-probabilities under the reference policy."""

    rollout: Sampled
    advantage: float
    reference: tuple[float, ...] | None = None


@dataclass(frozen=True)
class LearnerSettings:
    """Settings of the updates by mini-batches."""

    objective: GRPOSettings
    micro_tokens: int = 8192  # most tokens of a forward; a longer rollout is one by itself
    grad_clip: float = 1.0
    quantized: bool = True  # the forward computes with the stored values, as the engine did
    balance: float = 1e-4  # weight of the router's balance loss
    indexer: float = 1.0  # weight of the indexer's loss
    recompute: Recompute = "none"  # activation checkpointing: training/recompute.py

    def __post_init__(self) -> None:
        if self.micro_tokens < 1:
            raise ValueError(f"micro_tokens is {self.micro_tokens}; allowed: 1 or more")
        if not self.grad_clip > 0.0:
            raise ValueError(f"grad_clip is {self.grad_clip}; allowed: more than 0")


@dataclass(frozen=True)
class Update:
    """Figures of one update, for the log."""

    loss: float
    grad_norm: float
    kl: float
    clipped: float
    dropped: int
    largest_difference: float
    routing_differences: int  # recorded choices of experts that this forward would not have made
    indexer_differences: int  # and of entries


class UpdateError(RuntimeError):
    """A loss or a gradient is not finite, or no rollout could be sampled; nothing was updated."""


def update(
    model: Transformer, optimizer: MuonAdamW, batch: Sequence[Judged], rate: float, settings: LearnerSettings
) -> Update:
    """One step of the optimizer on a mini-batch. UpdateError, with the weights unchanged, if a number is not finite."""
    optimizer.zero_grad()
    found: list[tuple[int, float, Objective]] = []
    routing = indexer = 0
    stored = stored_weights(model, indexers=False) if settings.quantized else nullcontext()
    with stored, recomputing(model, settings.recompute):
        place = 0
        for rollouts in packed((judged.rollout for judged in batch), settings.micro_tokens):
            aux = replaying(rollouts, model)
            objective = _objective(model, batch[place : place + len(rollouts)], len(batch), settings, aux)
            found.append((sum(rollout.num_tokens for rollout in rollouts), *objective))
            routing, indexer = routing + aux.expert_differences, indexer + aux.entry_differences
            place += len(rollouts)
    norm = optimizer.gradient_norm()
    loss = sum(value for _, value, _ in found)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        optimizer.zero_grad()
        raise UpdateError(f"loss {loss}, gradient norm {norm}: not finite; nothing was updated")
    optimizer.step(rate, min(1.0, settings.grad_clip / (norm + 1e-6)))
    optimizer.zero_grad()
    tokens = sum(count for count, _, _ in found)
    return Update(
        loss,
        norm,
        kl=sum(count * objective.kl for count, _, objective in found) / tokens,
        clipped=sum(count * objective.clipped for count, _, objective in found) / tokens,
        dropped=sum(objective.dropped for _, _, objective in found),
        largest_difference=max(objective.largest_difference for _, _, objective in found),
        routing_differences=routing,
        indexer_differences=indexer,
    )


def _objective(
    model: Transformer, micro: Sequence[Judged], answers: int, settings: LearnerSettings, aux: AuxLosses
) -> tuple[float, Objective]:
    """Forward and backward of a micro-batch of a mini-batch of `answers`: its share of the loss, and the objective."""
    log_p = answer_log_probabilities(model, [judged.rollout for judged in micro], aux=aux)
    objective = grpo_loss(
        log_p,
        _laid(log_p, (judged.rollout.log_probabilities for judged in micro)),
        [judged.rollout.num_tokens for judged in micro],
        [judged.advantage for judged in micro],
        settings.objective,
        None if micro[0].reference is None else _laid(log_p, (judged.reference or () for judged in micro)),
        answers,
    )
    share = len(micro) / answers
    loss = objective.loss + share * (settings.balance * aux.balance_loss + settings.indexer * aux.indexer_loss)
    loss.backward()
    return float(loss.detach()), objective


def _laid(like: Tensor, parts: Iterable[Sequence[float]]) -> Tensor:
    """Numbers laid end to end as a tensor like another."""
    return torch.tensor([number for part in parts for number in part], dtype=like.dtype, device=like.device)


@torch.no_grad()
def with_reference(reference: Transformer, rollouts: Sequence[Sampled], tokens: int) -> list[tuple[float, ...]]:
    """Log-probabilities of each rollout's tokens under a frozen reference policy."""
    found: list[tuple[float, ...]] = []
    for micro in packed(rollouts, tokens):
        log_p = answer_log_probabilities(reference, micro)
        found += [tuple(part.tolist()) for part in log_p.split([rollout.num_tokens for rollout in micro])]
    return found
