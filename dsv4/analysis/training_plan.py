"""Time of a training run, predicted from its config, its stages and the machine; and the degrees that suit it.

The model's operations, those that run again, and Muon's, at the machine's rate times its efficiency. A step takes
the longer of its computation and its communication, which overlap, and the bubble of its pipeline.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from dsv4.analysis.activations import POLICIES, Recompute
from dsv4.analysis.degrees import Degrees
from dsv4.analysis.flops import decode_flops
from dsv4.analysis.hardware import Precision
from dsv4.analysis.training_flops import adapter_flops, training_flops
from dsv4.analysis.training_memory import (
    Memory,
    Setting,
    StageShape,
    rank_memory,
    received_bytes,
    stage_parts,
)
from dsv4.analysis.training_weights import optimizer_flops

USABLE = 0.92  # of the memory: the rest is lost between allocations
SHORTEST_SLICE = 4096  # tokens of a row that a context rank has at least, where the plan chooses
MOST_ROUNDING = 0.25  # of a step's rows, so that each rank with rows of its own has as many
MOST_DOUBLINGS = 5  # of the GPUs, in search of some on which a stage fits


@dataclass(frozen=True)
class StagePlan:
    """Prediction for one stage; memory is that of its fullest rank. The shape's steps are whole rows of every rank."""

    shape: StageShape
    asked_rows: int  # of a step in the recipe
    degrees: Degrees
    recompute: Recompute
    micro_batches: int  # per rank and step
    memory: Memory
    fits: bool
    computation: float  # seconds per step
    communication: float
    bubble: float  # share of the step that a pipeline waits
    mfu: float

    @property
    def step_seconds(self) -> float:
        return max(self.computation, self.communication) / (1.0 - self.bubble)

    @property
    def seconds(self) -> float:
        """Of the whole stage; the steps of a growing batch take time by their tokens."""
        return self.step_seconds * self.shape.tokens / self.shape.batch_tokens


def plan_stage(setting: Setting, shape: StageShape, degrees: Degrees, recompute: Recompute) -> StagePlan:
    """Predict a stage for given degrees. ValueError if they are not allowed."""
    config = setting.config
    degrees.check(setting.gpus, config.n_routed_experts, config.num_hidden_layers)
    asked, micro = _rows(shape), _micro_batches(shape, degrees.batches)
    if micro is None:
        raise ValueError(
            f"stage {shape.name!r}: data {degrees.data} x expert {degrees.expert}; allowed: as many as the {asked} "
            f"rows of a step can be dealt to, each as many, with at most {MOST_ROUNDING:.0%} more or fewer rows"
        )
    if (rows := micro * degrees.batches) != asked:
        steps = max(1, round(shape.steps * asked / rows))
        shape = replace(shape, batch_tokens=rows * shape.row_tokens, steps=steps)
    memory = max(
        (rank_memory(setting, shape, degrees, recompute, place, micro) for place in range(degrees.pipeline)),
        key=lambda memory: memory.total,
    )
    flops, again = _flops(setting, shape, recompute)
    rate = setting.gpus * setting.efficiency * _rate(setting)
    bf16 = setting.gpus * setting.efficiency * setting.machine.bf16
    updates = optimizer_flops(config) if setting.adapters is None else setting.adapters.optimizer_flops
    computation = (flops + again) / rate + updates / bf16
    waiting = degrees.pipeline - 1
    bubble = waiting / (micro + waiting)
    step = max(computation, communication := _communication(setting, shape, degrees, micro)) / (1 - bubble)
    return StagePlan(
        shape, asked, degrees, recompute, micro, memory, memory.total <= USABLE * setting.machine.memory, computation,
        communication, bubble, flops / (step * setting.gpus * setting.machine.rate(_product(setting))),
    )  # fmt: skip


def choose_stage(
    setting: Setting, shape: StageShape, recompute: Recompute | None = None, **given: int | None
) -> StagePlan:
    """Fastest plan that fits in memory, the smallest if none does; degrees that are `given` stay. ValueError if none
    is allowed."""
    policies = POLICIES if recompute is None else (recompute,)
    best: StagePlan | None = None
    for degrees in _candidates(setting, shape, given):
        for policy in policies:
            plan = plan_stage(setting, shape, degrees, policy)
            if best is None or _order(plan) < _order(best):
                best = plan
    if best is None:
        words = ", ".join(f"{name} {value}" for name, value in given.items() if value is not None) or "any degrees"
        raise ValueError(
            f"stage {shape.name!r} cannot be cut for {setting.gpus} GPUs with {words}: data x expert x context x "
            f"pipeline must be the GPUs, data x expert must share the {_rows(shape)} rows of a step evenly, a context "
            f"rank needs {SHORTEST_SLICE} tokens, pipeline at most the {setting.config.num_hidden_layers} layers"
        )
    return best


def enlarge_stage(
    setting: Setting, shape: StageShape, recompute: Recompute | None = None, **given: int | None
) -> StagePlan | None:
    """The plan on the fewest GPUs, doubled from those of the setting, on which the stage fits; None if on none tried.

    Found fast: with the policy that keeps least, unless one is given.
    """
    for doubling in range(1, MOST_DOUBLINGS + 1):
        larger = replace(setting, gpus=setting.gpus << doubling)
        for degrees in _candidates(larger, shape, given):
            plan = plan_stage(larger, shape, degrees, recompute or "blocks")
            if plan.fits:
                return choose_stage(larger, shape, recompute, **given)
    return None


def _micro_batches(shape: StageShape, batches: int) -> int | None:
    """Rows per step of each rank that has its own; None if the step would have to change too much."""
    rows = _rows(shape)
    micro = max(1, round(rows / batches))
    return micro if abs(micro * batches - rows) <= MOST_ROUNDING * rows else None


def _rows(shape: StageShape) -> int:
    """Micro-batches of a step, all ranks' together."""
    return max(1, shape.batch_tokens // shape.row_tokens)


def _order(plan: StagePlan) -> tuple[bool, float, float]:
    return (not plan.fits, round(plan.seconds, 9) if plan.fits else 0.0, plan.memory.total)


def _candidates(setting: Setting, shape: StageShape, given: dict[str, int | None]) -> Iterator[Degrees]:
    config = setting.config
    most_context = max(1, shape.row_tokens // SHORTEST_SLICE)
    for pipeline in _allowed(given.get("pipeline"), _divisors(setting.gpus, min(config.num_hidden_layers, 64))):
        for context in _allowed(given.get("context"), _divisors(setting.gpus // pipeline, most_context)):
            batches = setting.gpus // (pipeline * context)
            experts = [1] if setting.shared_weights else _divisors(batches, config.n_routed_experts)
            for expert in _allowed(given.get("expert"), experts):
                degrees = Degrees(pipeline, given.get("data") or max(1, batches // expert), context, expert)
                divides = degrees.ranks == setting.gpus and config.n_routed_experts % expert == 0
                if divides and _micro_batches(shape, degrees.batches) is not None:
                    yield degrees


def _allowed(given: int | None, choices: list[int]) -> list[int]:
    return choices if given is None else [given]


def _divisors(number: int, most: int) -> list[int]:
    return [n for n in range(1, min(number, most) + 1) if number % n == 0]


def _product(setting: Setting) -> Precision:
    """Precision whose rate MFU is measured against: BF16 for FP8 too, as is usual."""
    return "fp32" if setting.precision == "fp32" else "bf16"


@lru_cache(maxsize=64)
def _rate(setting: Setting) -> float:
    """Products per second of one GPU; in FP8 linear layers and experts run at its rate, the rest at BF16's."""
    if setting.precision != "fp8":
        return setting.machine.rate(setting.precision)
    formats = decode_flops(setting.config, 4096).by_format
    fast = formats["fp8"] / sum(formats.values())
    return 1 / (fast / setting.machine.fp8 + (1 - fast) / setting.machine.bf16)


@lru_cache(maxsize=256)
def _flops(setting: Setting, shape: StageShape, recompute: Recompute) -> tuple[float, float]:
    """FLOPs of a step's forward and backward, and of what runs again."""
    documents = shape.batch_tokens / shape.sequence
    config, lengths, adapters = setting.config, (shape.sequence,), setting.adapters
    if adapters is None:
        flops = documents * training_flops(config, lengths, shape.phase, setting.mtp)
        forward = flops / 3
    else:
        batches = _rows(shape) / documents
        parts = adapter_flops(config, lengths, shape.phase, setting.mtp, adapters, batches)
        forward, flops = documents * parts[0], documents * sum(parts)
    terms = decode_flops(setting.config, shape.sequence // 2).terms
    total, head = sum(terms.values()), terms["head"]
    experts, mixes = terms["experts"] + terms["router"], terms["mHC"]
    shares = {
        "none": 0,
        "attention": total - experts - head - mixes,
        "experts": experts,
        "sublayers": total - head - mixes,
        "blocks": total - head,
    }
    return flops, forward * shares[recompute] / total


def _communication(setting: Setting, shape: StageShape, degrees: Degrees, micro: int) -> float:
    """Seconds per step: gathers and reductions of parameters, exchanges of tokens among expert ranks, of entries among
    context ranks."""
    if setting.shared_weights:
        return 0.0
    config = setting.config
    _, weights = stage_parts(setting, degrees.pipeline, 0)
    seconds = 0.0
    if setting.adapters is not None:
        ranks = degrees.shards  # that hold the same adapters, but for those of experts, and add up their gradients
        summed = 2 * (1 - 1 / ranks) * 4 * setting.adapters.numbers() / degrees.pipeline
        seconds += summed / setting.machine.bandwidth(ranks)
    elif degrees.shards > 1:
        held = weights.dense + weights.experts / degrees.expert
        share = (degrees.shards - 1) / degrees.shards
        # In fp32, for each micro-batch: gathered for the forward and again for the backward, and gradients reduced.
        times = 2 if setting.keep_gathered else 3
        seconds += share * held * 4 * times * micro / setting.machine.bandwidth(degrees.shards)
    if degrees.expert > 1:
        tokens = micro * shape.row_tokens / degrees.context * config.num_hidden_layers / degrees.pipeline
        moved = tokens * config.num_experts_per_tok * config.hidden_size * 2 * 4 * (1 - 1 / degrees.expert)
        seconds += moved / setting.machine.bandwidth(degrees.expert)
    if degrees.context > 1:
        layers, _ = stage_parts(setting, degrees.pipeline, 0)
        received = sum(received_bytes(setting, shape, degrees, layer) for layer in layers)
        # There for the forward and for what runs again, and back as gradients.
        seconds += 3 * micro * received / setting.machine.bandwidth(degrees.context * degrees.expert)
    return seconds
