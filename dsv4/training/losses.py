"""Training losses over a ragged batch: next token, multi-token prediction; targets never cross a document."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dsv4.kernels.gather import take_rows

if TYPE_CHECKING:
    from dsv4.model.aux_losses import AuxLosses
    from dsv4.model.batch import RaggedBatch
    from dsv4.model.transformer import Transformer

CSA_RATIO = 4


class NoTargetsError(ValueError):
    """No token of a step is a target."""


@dataclass(frozen=True)
class LossWeights:
    """Weights of the summed loss. The report gives MTP 0.3 (0.1 in the decay), balance 1e-4, and no indexer weight.

    balance: of every layer's loss. They add up, as in V3.
    """

    mtp: float = 0.3
    balance: float = 1e-4
    indexer: float = 1.0


@dataclass(frozen=True)
class Counts:
    """Denominators of the means in a loss. Counts of several micro-batches add up."""

    targets: int = 0  # of next token and accuracy
    mtp_targets: int = 0
    tokens: int = 0  # of balance
    indexed: int = 0  # of the indexer: tokens that see an entry of a CSA layer

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Losses:
    """Parts of a loss as Python floats, for the log; for one of several micro-batches, its share of their mean.

    balance: sum over score-routed layers, the MTP block's too, of the sequence-wise losses; each is about 1 when even.
    indexer: mean over CSA layers.
    """

    next_token: float
    accuracy: float
    mtp: float
    balance: float
    indexer: float
    targets: int


def target_rows(cu_seqlens: Tensor, mask: Tensor, ahead: int) -> tuple[Tensor, Tensor]:
    """Pairs (row t, row t + ahead) in one document whose second row is a target, as two int64 [n].

    `cu_seqlens` int64 [N + 1]; `mask` bool [T], True for targets.
    """
    cu_seqlens = cu_seqlens.to(mask.device)
    rows = torch.arange(len(mask), device=mask.device)
    ends = torch.repeat_interleave(cu_seqlens[1:], cu_seqlens.diff())
    rows = rows[rows + ahead < ends]
    rows = rows[mask[rows + ahead]]
    return rows, rows + ahead


def pack_masks(masks: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> Tensor:
    """Concatenate the documents' masks to bool [T]."""
    return torch.tensor([bool(flag) for mask in masks for flag in mask], dtype=torch.bool, device=device)


def batch_targets(batch: RaggedBatch, mask: Tensor, ahead: int) -> tuple[Tensor, Tensor]:
    """(rows [n] of the batch that have a target `ahead` tokens on, its id [n]); both int64.

    `mask` bool [T], True for targets; in a part of a batch [T + len(part.ahead)], of the tokens that follow too.
    """
    if batch.part is None:
        rows, targets = target_rows(batch.cu_seqlens, mask, ahead)
        return rows, batch.token_ids[targets]
    ends = batch.cu_seqlens
    ends[-1] += len(batch.part.ahead)
    rows, targets = target_rows(ends, mask, ahead)
    here = rows < batch.num_tokens
    return rows[here], torch.cat((batch.token_ids, batch.part.ahead))[targets[here]]


def following_ids(batch: RaggedBatch) -> Tensor:
    """Id of the next token in the document, int64 [T]; for a document's last token its own id.

    That id reaches no earlier row, is no target and does not count in the router's load and balance loss.
    """
    following = batch.token_ids.roll(-1)
    last = (batch.cu_seqlens[1:] - 1).to(following.device)
    following[last] = batch.token_ids[last]
    if batch.part is not None and len(batch.part.ahead):
        following[-1] = batch.part.ahead[0]
    return following


def count_parts(batch: RaggedBatch, mask: Tensor) -> Counts:
    """Counts that the losses of `batch` with targets `mask` bool [T] are means over.

    Those of the parts of a batch add up to its own.
    """
    return Counts(
        targets=len(batch_targets(batch, mask, 1)[0]),
        mtp_targets=len(batch_targets(batch, mask, 2)[0]),
        tokens=batch.num_tokens,
        indexed=_indexed(batch),
    )


def _indexed(batch: RaggedBatch) -> int:
    """Number of tokens that see an entry of a CSA layer."""
    first, ends = np.maximum(batch.starts, CSA_RATIO - 1), batch.starts + batch.lengths
    return int((ends - first).clip(min=0).sum())


def compute_losses(
    model: Transformer,
    batch: RaggedBatch,
    mask: Tensor,
    weights: LossWeights,
    aux: AuxLosses,
    totals: Counts | None = None,
) -> tuple[Tensor, Losses]:
    """Run `batch` forward and return (weighted loss, its parts); `mask` bool [T] marks the targets.

    `totals` are the counts of all micro-batches of the step, None if this is the only one: losses and gradients of the
    micro-batches add up to those of one batch of all their documents, and so do those of the parts of a batch. Only
    rows with a target are read out. NoTargetsError if no row of the step has one.
    """
    totals = totals or count_parts(batch, mask)
    if not totals.targets:
        raise NoTargetsError("the batch holds no target: every masked-in token is the first of its document")
    return losses_of_streams(model, model.forward_ragged(batch, aux=aux), batch, mask, weights, aux, totals)


def losses_of_streams(
    model: Transformer,
    streams: Tensor,
    batch: RaggedBatch,
    mask: Tensor,
    weights: LossWeights,
    aux: AuxLosses,
    totals: Counts,
) -> tuple[Tensor, Losses]:
    """As `compute_losses`, from the streams [T, hc_mult, d] after the last main layer."""
    zero = torch.zeros((), device=streams.device)
    rows, targets = batch_targets(batch, mask, 1)
    accuracy = mtp = zero
    # No rows are a part of the loss too: experts may be divided over processes, which all run each exchange's backward.
    next_token = take_rows(streams, rows[:0]).sum()
    if len(rows):
        loss, predicted = model.cross_entropy(take_rows(streams, rows), targets)
        next_token = loss / totals.targets
        accuracy = (predicted == targets).sum() / totals.targets

    # If any micro-batch has an MTP target, all run the block: its router's balance is a mean over all tokens.
    ends = [streams]
    if weights.mtp and totals.mtp_targets and len(model.mtp):
        mtp_streams = model.mtp_forward(streams, following_ids(batch), batch, aux=aux)
        ends.append(mtp_streams)
        rows, targets = batch_targets(batch, mask, 2)
        mtp = take_rows(mtp_streams, rows[:0]).sum()
        if len(rows):
            loss, _ = model.cross_entropy(take_rows(mtp_streams, rows), targets, depth=0)
            mtp = loss / totals.mtp_targets

    added, balance, indexer = auxiliary_losses(batch, weights, aux, totals)
    total = next_token + weights.mtp * mtp + added
    if batch.part is not None:
        total = batch.part.tie(total, *ends)
    numbers = [float(value.detach()) for value in (next_token, accuracy, mtp, balance, indexer)]
    return total, Losses(*numbers, targets=count_parts(batch, mask).targets)


def auxiliary_losses(
    batch: RaggedBatch, weights: LossWeights, aux: AuxLosses, totals: Counts
) -> tuple[Tensor, Tensor, Tensor]:
    """(weighted sum, balance, indexer): the losses that layers reported to `aux`, as shares of the step's means."""
    indexed = _indexed(batch)
    balance = aux.balance_loss * (batch.num_tokens / totals.tokens)
    indexer = aux.indexer_loss * (indexed / max(1, totals.indexed))
    return weights.balance * balance + weights.indexer * indexer, balance, indexer


def sum_losses(parts: Iterable[Losses]) -> Losses:
    """Sum of the shares of several micro-batches, which is the mean over all of them."""
    columns = zip(*(astuple(part) for part in parts), strict=True)
    return Losses(*(sum(column) for column in columns))


def not_finite(losses: Losses) -> list[str]:
    """Parts that are not finite, each as "name value"."""
    values = {f.name: getattr(losses, f.name) for f in fields(losses)}
    return [f"{name} {value}" for name, value in values.items() if value - value != 0]
