"""Batches of one process in each step of a run: their numbers, and a reader that packs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from dsv4.model.transformer import Transformer
from dsv4.training.anticipatory import Anticipation, predict_routing
from dsv4.training.batch_size import BatchSize
from dsv4.training.gradient import BatchSource, MicroBatch, Routing, Work, pack_batch
from dsv4.training.sources import MixtureSource


@dataclass(frozen=True)
class Place:
    """A process's share of a step: `micro_batches` micro-batches, after those of lower ranks."""

    rank: int
    replicas: int
    micro_batches: int

    def numbers(self, step: int, size: BatchSize | None = None) -> range:
        """Batch numbers of this process in a step of a stage with batches of `size`; None: `micro_batches` per step."""
        count, before = self.micro_batches, step * self.micro_batches
        if size is not None:
            count, before = size.at(step), size.before(step)
        first = before * self.replicas + self.rank * count
        return range(first, first + count)

    def all_numbers(self, step: int, size: BatchSize | None = None) -> range:
        """Batch numbers of all processes in a step of a stage with batches of `size`."""
        first, last = replace(self, rank=0), replace(self, rank=self.replicas - 1)
        return range(first.numbers(step, size).start, last.numbers(step, size).stop)


class Reader:
    """Reads and packs a process's batches; those read ahead are kept until their step."""

    def __init__(self, place: Place, sources: Sequence[BatchSource], device: torch.device) -> None:
        self.place, self._sources, self._device = place, sources, device
        self._ahead: dict[tuple[int, int], list[MicroBatch]] = {}  # by stage and step

    def read(self, work: Work) -> list[MicroBatch]:
        """Batches of a step, with their routing if `work` has it."""
        key = work.stage, work.step
        for source in self._sources[: work.stage]:  # of stages that have ended, unless the run goes back
            if isinstance(source, MixtureSource):
                source.close()
        batches = self._ahead.get(key) or self._pack(work)
        self._ahead = {later: kept for later, kept in self._ahead.items() if later > key}
        numbered = zip(self.place.numbers(work.step, work.size), batches, strict=True)
        return [replace(batch, routing=work.routing.get(number, {})) for number, batch in numbered]

    def anticipate(self, model: Transformer, request: Anticipation) -> dict[int, Routing]:
        """Routing of this process's batches of a later step, by batch number."""
        work = request.work
        routing = predict_routing(model, self.ahead(work), work)
        return dict(zip(self.place.numbers(work.step, work.size), routing, strict=True))

    def ahead(self, work: Work) -> list[MicroBatch]:
        """Batches of this or a later step, kept until then."""
        key = work.stage, work.step
        batches = self._ahead[key] = self._ahead.get(key) or self._pack(work)
        return batches

    def _pack(self, work: Work) -> list[MicroBatch]:
        numbers = self.place.numbers(work.step, work.size)
        return [pack_batch(self._sources[work.stage].batch(number), self._device) for number in numbers]
