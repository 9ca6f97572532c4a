"""Forward and backward of one process's micro-batches, their losses being means over all micro-batches of the step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from dsv4.analysis.activations import Recompute
from dsv4.config import COMPRESSION_KINDS, ModelConfig
from dsv4.kernels.precision import Precision, precision
from dsv4.model.aux_losses import AuxLosses
from dsv4.model.batch import RaggedBatch
from dsv4.model.transformer import Transformer
from dsv4.training.attention_phase import AttentionPhase, attention_phase
from dsv4.training.batch_size import BatchSize
from dsv4.training.losses import Counts, Losses, LossWeights, compute_losses, count_parts, pack_masks, sum_losses
from dsv4.training.qat import stored_weights
from dsv4.training.recompute import recomputing

# Experts of each token of a batch, int16 [T, k], by module name of the MoE ("layers.3.ffn").
Routing = dict[str, Tensor]


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
    """Parameters of one step's forward and backward: stage (the source), step in it, and numerics.

    routing: chosen ahead, by batch number (anticipatory.py); other batches are routed by their own forward.
    """

    stage: int
    step: int
    weights: LossWeights
    quantized: bool
    precision: Precision = "fp32"
    attention: AttentionPhase = "sparse"
    size: BatchSize | None = None  # None: as many micro-batches in every step as the process has by default
    count_clamps: bool = False
    recompute: Recompute = "none"
    routing: Mapping[int, Routing] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """Result of some micro-batches besides their gradient: share of the step's losses, expert loads, tokens.

    clamps: as in AuxLosses; empty unless they are counted.
    """

    losses: Losses
    loads: dict[str, Tensor]
    tokens: int
    lengths: tuple[int, ...] = ()  # of the documents; of one that is cut over ranks once, and whole
    clamps: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class MicroBatch:
    """Packed documents, their targets bool [T], the counts that their losses are means over, and routing from before.

    Layers that `routing` does not name choose the experts themselves.
    """

    batch: RaggedBatch
    mask: Tensor
    counts: Counts
    routing: Routing = field(default_factory=dict)


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
    with step_numerics(model, work), recomputing(model, work.recompute):
        results = [_compute_one(model, batch, work, totals) for batch in batches]
    return sum_results(results)


@contextmanager
def step_numerics(model: Transformer, work: Work, whole: bool = True) -> Iterator[None]:
    """Context of the forwards of a step: stored weights, attention, precision. whole: False for a pipeline's stage."""
    stored = stored_weights(model) if work.quantized else nullcontext()
    with stored, attention_phase(model, work.attention, whole), precision(work.precision):
        yield


def start_aux(config: ModelConfig, data: MicroBatch, work: Work, totals: Counts) -> AuxLosses:
    """AuxLosses of a micro-batch's forward, with its routing on the device.

    A CSA layer counts whether its indexer learns or not: with some adapted, each has the gradient that it has with all.
    """
    routing = {name: index.to(data.mask.device, torch.int64) for name, index in data.routing.items()}
    with_mtp = bool(work.weights.mtp and totals.mtp_targets and config.num_nextn_predict_layers)
    ratios = config.compress_ratios[: config.num_hidden_layers + (1 if with_mtp else 0)]
    csa_layers = sum(COMPRESSION_KINDS[ratio].has_indexer for ratio in ratios)
    return AuxLosses(routing, work.count_clamps, max(1, csa_layers))


def make_result(losses: Losses, aux: AuxLosses, batch: RaggedBatch | None) -> Result:
    """Result of one micro-batch; batch: of which it counts tokens and documents, None where another process does."""
    loads, clamps = ({name: count.cpu() for name, count in counts.items()} for counts in (aux.loads, aux.clamps))
    tokens, lengths = (0, ()) if batch is None else (batch.num_tokens, _begun_lengths(batch))
    return Result(losses, loads, tokens, lengths, clamps)


def _compute_one(model: Transformer, data: MicroBatch, work: Work, totals: Counts) -> Result:
    aux = start_aux(model.config, data, work, totals)
    total, losses = compute_losses(model, data.batch, data.mask, work.weights, aux, totals)
    if total.requires_grad:  # not so for a batch without targets where the head alone learns
        total.backward()
    return make_result(losses, aux, data.batch)


def _begun_lengths(batch: RaggedBatch) -> tuple[int, ...]:
    """Lengths of the documents that begin in a batch; of those that go on in other ranks' parts, the whole length."""
    lengths = batch.lengths if batch.part is None else batch.part.document_lengths[batch.starts == 0]
    return tuple(lengths.tolist())


def sum_results(results: Sequence[Result]) -> Result:
    """Sum of several results: losses, loads and tokens added up."""
    loads = _sum_counts_by_name([result.loads for result in results])
    clamps = _sum_counts_by_name([result.clamps for result in results])
    lengths = tuple(length for result in results for length in result.lengths)
    return Result(sum_losses(r.losses for r in results), loads, sum(r.tokens for r in results), lengths, clamps)


def _sum_counts_by_name(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    names = dict.fromkeys(name for part in parts for name in part)  # a pipeline's stages have different ones
    return {name: torch.stack([part[name] for part in parts if name in part]).sum(0) for name in names}
