"""Anticipatory Routing: a step's tokens go to experts that were chosen with the parameters of some steps before.

An outlier of an expert then cannot choose its own tokens in the same step, a circle that the report holds to be the
cause of loss spikes. The choice is computed ahead, in a forward of its own; features and the experts' weights are those
of the step itself. Hash-routed layers choose by token id and need none of this.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dsv4.model.moe import MoE
from dsv4.model.transformer import Transformer
from dsv4.training.gradient import MicroBatch, Routing, Work, step_numerics
from dsv4.training.losses import following_ids
from dsv4.training.stages import Pipeline


@dataclass(frozen=True)
class Anticipation:
    """Request for the routing of a later step with the parameters of now."""

    work: Work


@torch.no_grad()
def predict_routing(model: Transformer, batches: Sequence[MicroBatch], work: Work) -> list[Routing]:
    """Experts that the routers choose for the batches of `work` with the parameters as they are."""
    with step_numerics(model, work):
        return [_predict_one(model, data, work) for data in batches]


def _predict_one(model: Transformer, data: MicroBatch, work: Work) -> Routing:
    with _recorded(model) as routing:
        streams = model.forward_ragged(data.batch)
        if work.weights.mtp and len(model.mtp):
            model.mtp_forward(streams, following_ids(data.batch), data.batch)
    return routing


@torch.no_grad()
def predict_stage_routing(
    model: Transformer, pipeline: Pipeline, batches: Sequence[MicroBatch], work: Work
) -> list[Routing]:
    """As `predict_routing`, of the layers of this rank's stage. All ranks of the pipeline call it."""
    place, found = pipeline.place, list[Routing]()
    with step_numerics(model, work, whole=False):
        for data in batches:
            streams = None if place.first else _received(model, pipeline, data.batch.num_tokens)
            with _recorded(model) as routing:
                streams = model.run_stage(data.batch, streams)
                if not place.last:
                    dist.send(streams.contiguous(), group=pipeline.group, group_dst=place.index + 1)
                elif work.weights.mtp and len(model.mtp):
                    model.mtp_forward(streams, following_ids(data.batch), data.batch)
            found.append(routing)
    return found


def _received(model: Transformer, pipeline: Pipeline, tokens: int) -> Tensor:
    """Streams [tokens, hc_mult, d] of the stage before."""
    shape = (tokens, model.config.hc_mult, model.config.hidden_size)
    streams = torch.empty(shape, dtype=model.dtype, device=model.device)
    dist.recv(streams, group=pipeline.group, group_src=pipeline.place.index - 1)
    return streams


@contextmanager
def _recorded(model: nn.Module) -> Iterator[Routing]:
    """Choice of every score-routed layer, filled by the forwards in this context."""
    routing: Routing = {}

    def recorder(name: str) -> Any:
        def record(module: nn.Module, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            routing[name] = output[1].to(torch.int16).cpu()

        return record

    layers = [m for m in model.modules() if isinstance(m, MoE) and m.gate.tid2eid is None]
    hooks = [layer.gate.register_forward_hook(recorder(layer.name)) for layer in layers]
    try:
        yield routing
    finally:
        for hook in hooks:
            hook.remove()


class RoutingAhead:
    """Routing of batches of this and later steps, by stage and batch number."""

    def __init__(self, batches: Mapping[int, Mapping[int, Routing]] | None = None) -> None:
        self._batches = {stage: dict(numbered) for stage, numbered in (batches or {}).items()}

    def __bool__(self) -> bool:
        return any(self._batches.values())

    def state(self) -> dict[int, dict[int, Routing]]:
        return {stage: dict(numbered) for stage, numbered in self._batches.items()}

    def holds(self, stage: int, numbers: range) -> bool:
        return all(number in self._batches.get(stage, {}) for number in numbers)

    def add(self, stage: int, found: Mapping[int, Routing]) -> None:
        self._batches.setdefault(stage, {}).update(found)

    def take(self, stage: int, numbers: range) -> dict[int, Routing]:
        """Remove and return the routing of these batches, and drop that of earlier ones."""
        mine = self._batches.get(stage, {})
        taken = {number: mine[number] for number in numbers}
        self._batches = {later: found for later, found in self._batches.items() if later > stage} | {
            stage: {number: found for number, found in mine.items() if number >= numbers.stop}
        }
        return taken
