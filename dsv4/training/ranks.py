"""Parallelism of a run on PyTorch's engine: this process's part of every step, as one of several ranks.

Its interface is that of Replicas; every rank runs the same loop and takes the same decisions from the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv4.analysis.degrees import Degrees
from dsv4.model.transformer import Transformer
from dsv4.parallel.fsdp import release_all
from dsv4.parallel.mesh import batch_rank
from dsv4.parallel.sums import gather_objects
from dsv4.training.anticipatory import predict_routing, predict_stage_routing
from dsv4.training.attention_phase import AttentionPhase
from dsv4.training.gradient import BatchSource, Result, Routing, Work, compute_gradient
from dsv4.training.losses import NoTargetsError
from dsv4.training.parts import Parts, cut_batches, sum_step_counts
from dsv4.training.rank_optim import RankOptimizer
from dsv4.training.stages import compute_stage_gradient
from dsv4.training.step_batches import Place, Reader


class Ranks:
    """All ranks of a run, seen from one; `micro_batches` per rank and step. Use as a context manager."""

    def __init__(
        self,
        model: Transformer,
        optimizer: RankOptimizer,
        sources: Sequence[BatchSource],
        parts: Parts,
        degrees: Degrees,
        micro_batches: int = 1,
    ) -> None:
        self.model, self.optimizer, self._parts = model, optimizer, parts
        self._place = Place(batch_rank(parts.mesh), degrees.batches, micro_batches)
        self._reader = Reader(self._place, sources, next(model.buffers(), next(model.parameters())).device)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def gradient(self, work: Work) -> list[Result]:
        """Leave the step's gradient with the optimizer; return each rank's share of the losses, in rank order.

        NoTargetsError, on all ranks, if no micro-batch of the step has a target.
        """
        batches = cut_batches(self._parts, self._reader.read(work))
        totals = sum_step_counts(self._parts, batches)
        if not totals.targets:
            numbers = self.numbers(work)
            raise NoTargetsError(f"batches {numbers[0]} to {numbers[-1]} of stage {work.stage} hold no target")
        pipeline = self._parts.pipeline
        if pipeline is None:
            result = compute_gradient(self.model, batches, work, totals)
        else:
            result = compute_stage_gradient(self.model, pipeline, batches, work, totals)
        self.optimizer.collect()
        return gather_objects(result)

    def numbers(self, work: Work) -> range:
        """Numbers of all batches of a step."""
        return self._place.all_numbers(work.step, work.size)

    def anticipate(self, work: Work) -> dict[int, Routing]:
        """Routing of all batches of this or a later step with the parameters of now, by batch number, on every rank."""
        batches = cut_batches(self._parts, self._reader.ahead(work))
        pipeline = self._parts.pipeline
        if pipeline is None:
            own = predict_routing(self.model, batches, work)
        else:
            own = predict_stage_routing(self.model, pipeline, batches, work)
        release_all(self.model)
        parts: dict[int, dict[str, list[Tensor]]] = {}
        for numbered in gather_objects(dict(zip(self._place.numbers(work.step, work.size), own, strict=True))):
            for number, routing in numbered.items():
                layers = parts.setdefault(number, {})  # of each stage some, cut over the context ranks in their order
                for name, chosen in routing.items():
                    layers.setdefault(name, []).append(chosen)
        return {number: {name: torch.cat(of) for name, of in layers.items()} for number, layers in parts.items()}

    def update(self, rate: float, scale: float, attention: AttentionPhase = "sparse") -> None:
        """Step all parameters, each rank its own."""
        self.optimizer.step(rate, scale, attention)
