"""Memory of a training run per rank, predicted from its config, its batches, the machine and its parallel degrees.

Parameters, gradients and momenta are fp32 and sharded over all ranks of a pipeline stage (FSDP). Dense matrices that
Muon steps are there twice, with their gradients: as every rank's rows, and whole at their owners (parallel/zero.py). In
fp32, two layers are gathered at a time, with a rank's share of the experts, and what is outside of the layers for the
whole step. Quantization-aware training rounds layers where they are gathered, and keeps rounded values of what is
outside; one rank keeps those of all. What `run.precision` rounds is kept whole until the step's end. Activations are
those of the native kernels (activations.py), for as many micro-batches as a pipeline stage has in flight.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache

from dsv4.analysis.activations import Recompute, head_activations, layer_activations, received_rows
from dsv4.analysis.adapters import Adapters
from dsv4.analysis.degrees import Degrees
from dsv4.analysis.hardware import Machine, Precision
from dsv4.analysis.pipeline_stages import stage_sizes
from dsv4.analysis.training_flops import Phase
from dsv4.analysis.training_weights import Weights, weights_by_part
from dsv4.config import ModelConfig

NUMBER_BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2, "fp8": 2}  # of activations; FP8 products read a cast copy
ROUNDED_BYTES = 2  # per weight that products multiply in BF16 or FP8, whose numbers are BF16's too


@dataclass(frozen=True)
class StageShape:
    """A stage: documents of `sequence` tokens in rows (micro-batches) of `row_tokens`, steps of `batch_tokens`."""

    name: str
    phase: Phase
    sequence: int
    row_tokens: int
    batch_tokens: int
    steps: int
    tokens: int


@dataclass(frozen=True)
class Setting:
    """Inputs of a plan that its choices leave alone."""

    config: ModelConfig
    machine: Machine
    gpus: int
    precision: Precision
    quantized: bool  # quantization-aware training at the end
    mtp: bool
    efficiency: float
    keep_gathered: bool = False  # layers stay gathered from their forward to their backward
    rounds: bool = False  # products multiply rounded weights, though all else is predicted in fp32
    shared_weights: bool = False  # the ranks are processes of one machine that share parameters and momenta
    adapters: Adapters | None = None  # trained in place of every parameter
    base_bytes: int | None = None  # of frozen weights that stay as they are stored; None: fp32, and what products read
    stages: tuple[int, ...] = ()  # main layers of each stage of a pipeline of as many; of others: of about equal cost


@dataclass(frozen=True)
class Memory:
    """Bytes per rank by kind."""

    weights: float  # gathered, and rounded ones that products read; in fp32 on one rank the masters themselves
    masters: float
    gradients: float
    momenta: float
    quantized: float  # stored values beside the masters, with quantization-aware training
    activations: float
    working: float  # what the largest layer's backward runs again, its gradients, the head's gradient
    buffers: float  # of communication
    runtime: float

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


def rank_memory(
    setting: Setting, shape: StageShape, degrees: Degrees, recompute: Recompute, place: int, micro: int
) -> Memory:
    """Memory of a rank at pipeline stage `place`, with `micro` micro-batches per step."""
    if setting.adapters is not None:
        return _adapted_memory(setting, setting.adapters, shape, degrees, recompute, place, micro)
    layers, weights = stage_parts(setting, degrees.pipeline, place)
    shards = 1 if setting.shared_weights else degrees.shards
    owned = 4 * (weights.dense - weights.adamw) / shards if shards > 1 else 0.0  # whole matrices, beside the rows
    masters = 4 * weights.total / shards + owned
    whole, outside = weights.on_rank(degrees.expert), _outside(setting, degrees, place)
    per_layer = (whole.total - outside.total) / len(layers)
    copies = 0.0
    if shards > 1:
        copies = 4.0 * (whole.total if setting.keep_gathered else min(whole.total, outside.total + 2 * per_layer))
    if setting.precision != "fp32" or setting.rounds:
        copies += ROUNDED_BYTES * whole.rounded
    activations, working, exchanged = _activations(setting, shape, degrees, recompute, place, micro)
    return Memory(
        weights=copies,
        masters=masters,
        # Of processes that share weights, and a sum.
        gradients=4 * weights.total / shards * (2 if setting.shared_weights and setting.gpus > 1 else 1) + owned,
        momenta=4 * (weights.total + weights.adamw) / shards,
        quantized=4.0 * (outside if shards > 1 else whole).quantized if setting.quantized else 0.0,
        activations=activations,
        working=working,
        # FSDP's, and later in the step those of the exchange with the owners: rows sent, and rows received.
        buffers=max(exchanged + 4 * (per_layer + outside.total), 2 * owned) if shards > 1 else exchanged,
        runtime=setting.machine.runtime,
    )


def _adapted_memory(
    setting: Setting,
    adapters: Adapters,
    shape: StageShape,
    degrees: Degrees,
    recompute: Recompute,
    place: int,
    micro: int,
) -> Memory:
    """Memory of a rank that trains adapters: the frozen weights of its stage and of its part of the experts, and these
    adapters whole, with gradients and moments."""
    layers, weights = stage_parts(setting, degrees.pipeline, place)
    whole, count = weights.on_rank(degrees.expert), setting.config.num_hidden_layers
    parts = frozenset(f"layers.{layer}" if layer < count else f"mtp.{layer - count}" for layer in layers)
    parts |= {"head"} if place == degrees.pipeline - 1 else frozenset()
    numbers = adapters.numbers(parts, degrees.expert)
    rounded = ROUNDED_BYTES * whole.rounded if setting.precision != "fp32" or setting.rounds else 0
    activations, working, exchanged = _activations(setting, shape, degrees, recompute, place, micro)
    return Memory(
        weights=float(4 * whole.total + rounded if setting.base_bytes is None else setting.base_bytes),
        masters=4.0 * numbers,
        gradients=4.0 * numbers,
        momenta=4.0 * numbers * (1 if adapters.muon else 2),
        quantized=0.0,
        activations=activations + 4 * adapters.made(parts),
        working=working,
        buffers=exchanged + (4 * numbers if degrees.ranks > degrees.pipeline else 0),
        runtime=setting.machine.runtime,
    )


def _activations(
    setting: Setting, shape: StageShape, degrees: Degrees, recompute: Recompute, place: int, micro: int
) -> tuple[float, float, float]:
    """Bytes of a rank's activations, of its backward's working memory, and of what experts' ranks exchange."""
    config, number = setting.config, NUMBER_BYTES[setting.precision]
    layers, _ = stage_parts(setting, degrees.pipeline, place)
    tokens = shape.row_tokens / degrees.context
    in_flight = min(degrees.pipeline - place, micro)
    reads = 0  # read-outs with a gradient
    if place == degrees.pipeline - 1 and shape.phase != "warmup":
        reads = 1 + (config.num_nextn_predict_layers if setting.mtp else 0)
    per_token, besides = head_activations(config, number)
    if setting.adapters is not None and not setting.adapters.has("head", "head"):
        besides = 0
    kept, most = _kept(
        config, layers, recompute, number, shape.phase, shape.sequence, per_token, reads, setting.adapters
    )
    activations, working = in_flight * tokens * kept, float(tokens * most) + reads * besides
    if degrees.context > 1:
        received = [received_bytes(setting, shape, degrees, layer) for layer in layers]
        activations += in_flight * sum(received) if recompute in ("none", "experts") else 0.0
        working += 2 * max(received)  # with their gradients
    exchanged = tokens * config.num_experts_per_tok * config.hidden_size * number * 2 if degrees.expert > 1 else 0.0
    return activations, working, exchanged


def received_bytes(setting: Setting, shape: StageShape, degrees: Degrees, layer: int) -> float:
    """Bytes that the last rank of a context dimension gets of earlier ones in a layer's forward, for a micro-batch."""
    rows = received_rows(setting.config, layer, shape.sequence)
    return (1 - 1 / degrees.context) * NUMBER_BYTES[setting.precision] * rows


def _outside(setting: Setting, degrees: Degrees, place: int) -> Weights:
    """Parameters of a rank that FSDP holds in the root's group: embedding, head, MTP blocks without their experts."""
    layers, weights = stage_parts(setting, degrees.pipeline, place)
    by_part, count = weights_by_part(setting.config), setting.config.num_hidden_layers
    main = sum((by_part[f"layers.{layer}"] for layer in layers if layer < count), Weights())
    experts = weights.experts - main.experts  # of MTP blocks, all of them quantized
    return Weights(weights.dense - main.dense, quantized=weights.quantized - main.quantized - experts)


@lru_cache(maxsize=4096)
def _kept(
    config: ModelConfig,
    layers: tuple[int, ...],
    recompute: Recompute,
    number_bytes: int,
    phase: Phase,
    sequence: int,
    read_out: int,
    reads: int,
    adapters: Adapters | None,
) -> tuple[int, int]:
    """Bytes per token that these layers and `reads` read-outs keep, and those besides at the backward's peak.

    By then it has freed what was kept behind the layer that it is in: that of the layers, and of their read-outs. An
    MTP block's backward comes before the main model's read-out's.
    """
    each = [layer_activations(config, layer, phase, sequence, adapters) for layer in layers]
    kept = [one.kept(recompute, number_bytes) for one in each]
    peaks: list[int] = []
    for i, one in enumerate(each):
        read_outs = min(reads, max(0, layers[i] - config.num_hidden_layers + 1))  # of the layers before
        held = sum(kept[: i + 1]) + read_outs * read_out
        peaks.append(held + one.working(recompute, number_bytes))
    total = sum(kept) + reads * read_out
    return total, max(0, max(peaks) - total)


def stage_parts(setting: Setting, ranks: int, place: int) -> tuple[tuple[int, ...], Weights]:
    """Layers of pipeline stage `place` of `ranks`, MTP blocks at the end of the last, and its parameters."""
    given = len(setting.stages) == ranks
    return _stage_parts(setting.config, setting.stages if given else stage_sizes(setting.config, ranks), place)


@lru_cache(maxsize=4096)
def _stage_parts(config: ModelConfig, sizes: tuple[int, ...], place: int) -> tuple[tuple[int, ...], Weights]:
    layers, ranks, first = config.num_hidden_layers, len(sizes), sum(sizes[:place])
    mine = list(range(first, first + sizes[place]))
    names = [f"layers.{layer}" for layer in mine] + ["embed"] * (place == 0)
    if place == ranks - 1:
        mine += range(layers, layers + config.num_nextn_predict_layers)
        names += ["head", *(f"mtp.{depth}" for depth in range(config.num_nextn_predict_layers))]
        names += ["embed"] * (ranks > 1 and config.num_nextn_predict_layers > 0)
    by_part = weights_by_part(config)
    return tuple(mine), sum((by_part[name] for name in names), Weights())
