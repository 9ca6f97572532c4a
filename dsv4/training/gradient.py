"""Forward and backward of one process's micro-batches, their losses being means over all micro-batches of the step."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dsv4.kernels.precision import Precision, precision
from dsv4.model.aux_losses import AuxLosses
from dsv4.model.batch import RaggedBatch
from dsv4.model.transformer import Transformer
from dsv4.training.attention_phase import AttentionPhase, attention_phase
from dsv4.training.batch_size import BatchSize
from dsv4.training.losses import Counts, Losses, LossWeights, compute_losses, count_parts, pack_masks, sum_losses
from dsv4.training.qat import stored_weights


class MaskedDocuments(Protocol):
    """Documents of one micro-batch and one mask per document: 1 for tokens that are targets."""

    @property
    def documents(self) -> Sequence[Sequence[int]]: ...
    @property
    def loss_masks(self) -> Sequence[Sequence[int]]: ...


class BatchSource(Protocol):
    """Random access to the batches of a stage by number, so that a run resumes without replaying data."""

    def batch(self, step: int, /) -> MaskedDocuments: ...


@dataclass(frozen=True)
class Work:
    """Parameters of one step's forward and backward: stage (the source), step in it, and numerics."""

    stage: int
    step: int
    weights: LossWeights
    quantized: bool
    precision: Precision = "fp32"
    attention: AttentionPhase = "sparse"
    size: BatchSize | None = None  # None: as many micro-batches in every step as the process has by default


@dataclass(frozen=True)
class Result:
    """Result of some micro-batches besides their gradient: share of the step's losses, expert loads, tokens."""

    losses: Losses
    loads: dict[str, Tensor]
    tokens: int
    lengths: tuple[int, ...] = ()  # of the documents


@dataclass(frozen=True)
class MicroBatch:
    """Packed documents, their targets bool [T], and the counts that their losses are means over."""

    batch: RaggedBatch
    mask: Tensor
    counts: Counts


def pack_batch(data: MaskedDocuments, device: torch.device) -> MicroBatch:
    """Concatenate the documents. ValueError if a document and its mask differ in length."""
    lengths, masks = [len(d) for d in data.documents], [len(m) for m in data.loss_masks]
    if lengths != masks:
        raise ValueError(f"a batch with documents of {lengths} tokens has loss masks of {masks}: one flag per token")
    batch, mask = RaggedBatch.pack(data.documents, device=device), pack_masks(data.loss_masks, device)
    return MicroBatch(batch, mask, count_parts(batch, mask))


def sum_counts(batches: Sequence[MicroBatch]) -> Counts:
    """Counts that the losses of all `batches` together are means over."""
    return sum((batch.counts for batch in batches), Counts())


def compute_gradient(
    model: Transformer, batches: Sequence[MicroBatch], work: Work, totals: Counts | None = None
) -> Result:
    """Run forward and backward on `batches` one by one, adding their gradients to those on the parameters.

    `totals` are the counts of all micro-batches of the step, including other processes'; None: `batches` are all.
    ValueError if the model is frozen.
    """
    if model.frozen:
        raise ValueError("the model is frozen, so that its weights take no gradient: call model.requires_grad_() first")
    totals = totals or sum_counts(batches)
    stored = stored_weights(model) if work.quantized else nullcontext()
    with stored, attention_phase(model, work.attention), precision(work.precision):
        results = [_compute_one(model, batch, work, totals) for batch in batches]
    return sum_results(results)


def _compute_one(model: Transformer, data: MicroBatch, work: Work, totals: Counts) -> Result:
    aux = AuxLosses()
    total, losses = compute_losses(model, data.batch, data.mask, work.weights, aux, totals)
    if total.requires_grad:  # not so for a batch without targets in a model without routers
        total.backward()
    loads = {name: load.cpu() for name, load in aux.loads.items()}
    return Result(losses, loads, data.batch.num_tokens, tuple(data.batch.lengths.tolist()))


def sum_results(results: Sequence[Result]) -> Result:
    """Sum of several results: losses, loads and tokens added up."""
    names = results[0].loads
    loads = {name: torch.stack([result.loads[name] for result in results]).sum(0) for name in names}
    lengths = tuple(length for result in results for length in result.lengths)
    return Result(sum_losses(r.losses for r in results), loads, sum(r.tokens for r in results), lengths)
