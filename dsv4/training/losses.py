"""Training losses over a ragged batch: next token, multi-token prediction; targets never cross a document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from dsv4.model.aux_losses import AuxLosses
    from dsv4.model.batch import RaggedBatch
    from dsv4.model.transformer import Transformer


@dataclass(frozen=True)
class LossWeights:
    """Weights of the summed loss. The report gives MTP 0.3 (0.1 in the decay) and balance 1e-4; not the indexer's."""

    mtp: float = 0.3
    balance: float = 1e-4
    indexer: float = 1.0


@dataclass(frozen=True)
class Losses:
    """The parts of a loss as plain numbers, for the log."""

    next_token: float
    accuracy: float
    mtp: float
    balance: float
    indexer: float
    targets: int


def target_rows(cu_seqlens: Tensor, mask: Tensor, ahead: int) -> tuple[Tensor, Tensor]:
    """Pairs (row t, target row t + ahead) inside one document whose target is trained on.

    `cu_seqlens` int64 [N + 1], `mask` bool [T] (true: this token is a target) -> two int64 [n].
    """
    cu_seqlens = cu_seqlens.to(mask.device)
    rows = torch.arange(len(mask), device=mask.device)
    ends = torch.repeat_interleave(cu_seqlens[1:], cu_seqlens.diff())
    rows = rows[rows + ahead < ends]
    rows = rows[mask[rows + ahead]]
    return rows, rows + ahead


def pack_masks(masks: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> Tensor:
    """Lay the documents' masks end to end -> bool [T]."""
    return torch.tensor([bool(flag) for mask in masks for flag in mask], dtype=torch.bool, device=device)


def compute_losses(
    model: Transformer, batch: RaggedBatch, mask: Tensor, weights: LossWeights, aux: AuxLosses
) -> tuple[Tensor, Losses]:
    """Forward `batch` -> (weighted loss, its parts); `mask` bool [T] marks the tokens that are targets.

    Logits are computed for rows with a target only. Raises ValueError when no row has one.
    """
    token_ids = batch.token_ids
    streams = model.forward_ragged(batch, aux=aux)
    rows, targets = target_rows(batch.cu_seqlens, mask, 1)
    if not len(rows):
        raise ValueError("the batch holds no target: every masked-in token is the first of its document")
    logits = model.logits(streams[rows])
    next_token = F.cross_entropy(logits, token_ids[targets])
    accuracy = (logits.detach().argmax(-1) == token_ids[targets]).float().mean()

    mtp = torch.zeros((), device=streams.device)
    mtp_rows, mtp_targets = target_rows(batch.cu_seqlens, mask, 2)
    if weights.mtp and len(mtp_rows):
        # The last row of a document has no next token. What stands there reaches no earlier row and is no target.
        following = torch.cat([token_ids[1:], token_ids[:1]])
        mtp_streams = model.mtp_forward(streams, following, batch, aux=aux)
        mtp = F.cross_entropy(model.mtp_logits(mtp_streams[mtp_rows]), token_ids[mtp_targets])

    balance, indexer = aux.balance_loss, aux.indexer_loss
    total = next_token + weights.mtp * mtp + weights.balance * balance + weights.indexer * indexer
    numbers = [float(value.detach()) for value in (next_token, accuracy, mtp, balance, indexer)]
    return total, Losses(*numbers, targets=len(rows))


def mean_losses(parts: Sequence[Losses]) -> Losses:
    """One record of the losses of several micro-batches: means weighted by targets, targets summed."""
    targets = sum(part.targets for part in parts)
    names = ("next_token", "accuracy", "mtp", "balance", "indexer")
    means = {name: sum(getattr(part, name) * part.targets for part in parts) / targets for name in names}
    return Losses(**means, targets=targets)
