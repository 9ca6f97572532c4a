"""Updates of GRPO and of distillation: their settings, the numerics of their forwards, the optimizer's step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsv4.analysis.activations import Recompute
from dsv4.model.aux_losses import AuxLosses
from dsv4.model.batch import RaggedBatch
from dsv4.post_training.rollouts import Sampled
from dsv4.training.losses import Counts, LossWeights, auxiliary_losses, count_parts
from dsv4.training.optim import MuonAdamW
from dsv4.training.qat import stored_weights
from dsv4.training.recompute import recomputing


class UpdateError(RuntimeError):
    """A loss or a gradient is not finite, or no rollout could be sampled; nothing was updated."""


class TrainServeError(RuntimeError):
    """Training computes other log-probabilities than the engine has sampled with; the step is not saved."""


@dataclass(frozen=True, kw_only=True)
class UpdateSettings:
    """Settings of an update's forwards and of its step; the report gives no values."""

    micro_tokens: int = 8192  # most tokens of a forward; a longer document is one by itself
    grad_clip: float = 1.0
    quantized: bool = True  # forwards compute with the stored values, as the engine does
    balance: float = 1e-4  # weight of the routers' balance loss
    indexer: float = 1.0  # weight of the indexers' loss
    recompute: Recompute = "none"  # activation checkpointing: training/recompute.py

    def __post_init__(self) -> None:
        if self.micro_tokens < 1:
            raise ValueError(f"micro_tokens is {self.micro_tokens}; allowed: 1 or more")
        if not self.grad_clip > 0.0:
            raise ValueError(f"grad_clip is {self.grad_clip}; allowed: more than 0")


@contextmanager
def update_numerics(model: nn.Module, settings: UpdateSettings) -> Iterator[None]:
    """Context of an update's forwards and backwards, which compute what the engine that serves the model does."""
    stored = stored_weights(model, indexers=False) if settings.quantized else nullcontext()
    with stored, recomputing(model, settings.recompute):
        yield


def count_documents(micro_batches: Iterable[Sequence[Sampled]]) -> Counts:
    """Counts that the losses of routers and indexers are means over, of all documents of an update."""
    batches = map(_laid, micro_batches)
    return sum((count_parts(one, torch.zeros(one.num_tokens, dtype=torch.bool)) for one in batches), Counts())


def auxiliary_loss(rollouts: Sequence[Sampled], settings: UpdateSettings, aux: AuxLosses, totals: Counts) -> Tensor:
    """Weighted losses of routers and indexers of a micro-batch, as shares of their means over `totals`."""
    weights = LossWeights(mtp=0.0, balance=settings.balance, indexer=settings.indexer)
    return auxiliary_losses(_laid(rollouts), weights, aux, totals)[0]


def _laid(rollouts: Sequence[Sampled]) -> RaggedBatch:
    """The rollouts' documents, laid end to end."""
    return RaggedBatch.pack([rollout.document for rollout in rollouts])


def take_step(optimizer: MuonAdamW, loss: float, rate: float, settings: UpdateSettings) -> float:
    """One step by the gradients on the parameters, which it clears; their norm before it is clipped.

    UpdateError, with the weights unchanged, if the loss or the norm is not finite.
    """
    norm = optimizer.gradient_norm()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        optimizer.zero_grad()
        raise UpdateError(f"loss {loss}, gradient norm {norm}: not finite; nothing was updated")
    optimizer.step(rate, min(1.0, settings.grad_clip / (norm + 1e-6)))
    optimizer.zero_grad()
    return norm
