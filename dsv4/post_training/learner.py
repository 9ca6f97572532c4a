"""Updates of a policy from judged rollouts: micro-batches by tokens, the stored weights' values in the forward."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4.model.aux_losses import AuxLosses
from dsv4.model.transformer import Transformer
from dsv4.post_training.grpo import GRPOSettings, Objective, grpo_loss
from dsv4.post_training.replay import replaying
from dsv4.post_training.rollouts import Sampled, answer_log_probabilities, packed
from dsv4.post_training.updates import UpdateSettings, auxiliary_loss, count_documents, take_step, update_numerics
from dsv4.training.losses import Counts
from dsv4.training.optim import MuonAdamW


@dataclass(frozen=True)
class Judged:
    """A rollout and its advantage; `reference` are its tokens' log-probabilities under the reference policy."""

    rollout: Sampled
    advantage: float
    reference: tuple[float, ...] | None = None


@dataclass(frozen=True)
class LearnerSettings(UpdateSettings):
    """Settings of the updates by mini-batches."""

    objective: GRPOSettings


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


def update(
    model: Transformer, optimizer: MuonAdamW, batch: Sequence[Judged], rate: float, settings: LearnerSettings
) -> Update:
    """One step of the optimizer on a mini-batch. UpdateError, with the weights unchanged, if a number is not finite."""
    optimizer.zero_grad()
    found: list[tuple[int, float, Objective]] = []
    routing = indexer = 0
    micro_batches = packed((judged.rollout for judged in batch), settings.micro_tokens)
    totals = count_documents(micro_batches)
    with update_numerics(model, settings):
        place = 0
        for rollouts in micro_batches:
            aux = replaying(rollouts, model)
            objective = _objective(model, batch[place : place + len(rollouts)], len(batch), settings, aux, totals)
            found.append((sum(rollout.num_tokens for rollout in rollouts), *objective))
            routing, indexer = routing + aux.expert_differences, indexer + aux.entry_differences
            place += len(rollouts)
    loss = sum(value for _, value, _ in found)
    norm = take_step(optimizer, loss, rate, settings)
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
    model: Transformer,
    micro: Sequence[Judged],
    answers: int,
    settings: LearnerSettings,
    aux: AuxLosses,
    totals: Counts,
) -> tuple[float, Objective]:
    """Forward and backward of a micro-batch of a mini-batch of `answers`: its share of the loss, and the objective.

    `totals`: counts of the mini-batch's documents, as of `count_documents`.
    """
    rollouts = [judged.rollout for judged in micro]
    log_p = answer_log_probabilities(model, rollouts, aux=aux)
    objective = grpo_loss(
        log_p,
        _laid(log_p, (rollout.log_probabilities for rollout in rollouts)),
        [rollout.num_tokens for rollout in rollouts],
        [judged.advantage for judged in micro],
        settings.objective,
        None if micro[0].reference is None else _laid(log_p, (judged.reference or () for judged in micro)),
        answers,
    )
    loss = objective.loss + auxiliary_loss(rollouts, settings, aux, totals)
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
