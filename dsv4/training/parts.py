"""One rank's part of a step on a device mesh: of the layers, and of each micro-batch.

A rank has the whole micro-batches of its `data` (and `expert`) coordinate, which is the same data for all ranks that
differ in `pipeline` and `context` alone; it cuts them itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from dsv4.analysis.pipeline_stages import stage_sizes
from dsv4.model.transformer import Transformer
from dsv4.parallel.context import cut_batch, even_cut
from dsv4.parallel.pipeline import end_group, keep_stage, place_of
from dsv4.parallel.sums import sum_numbers
from dsv4.training.gradient import MicroBatch, sum_counts
from dsv4.training.losses import Counts, count_parts
from dsv4.training.stages import Pipeline

# Dimensions of a mesh whose ranks hold the same layers; of these, those whose ranks hold the same experts too.
SAME_LAYERS, SAME_EXPERTS = ("data", "context", "expert"), ("data", "context")


@dataclass(frozen=True)
class Parts:
    """A rank's place in the mesh. pipeline: its stage; None: it has the whole model."""

    mesh: DeviceMesh
    pipeline: Pipeline | None

    def groups(self, dimensions: Sequence[str] = SAME_LAYERS) -> list[dist.ProcessGroup]:
        """Groups of more than one rank along `dimensions`, by default those whose ranks hold the same layers."""
        groups = [self.mesh.get_group(name) for name in dimensions]
        return [group for group in groups if group.size() > 1]


def place_rank(model: Transformer, mesh: DeviceMesh, sizes: Sequence[int] = ()) -> Parts:
    """Leave in `model` this rank's stage of the mesh's pipeline. All ranks call it, before the optimizer is made.

    sizes: main layers of each stage; empty: stages of about equal cost.
    """
    stages = mesh["pipeline"].size()
    if stages == 1:
        return Parts(mesh, None)
    config = model.config
    if sizes and len(sizes) != stages:
        raise ValueError(f"layers of {len(sizes)} stages are given; the pipeline has {stages} stages")
    place = place_of(sizes or stage_sizes(config, stages), mesh.get_local_rank("pipeline"), config.num_hidden_layers)
    keep_stage(model, place)
    return Parts(mesh, Pipeline(place, mesh.get_group("pipeline"), end_group(mesh)))


def cut_batches(parts: Parts, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
    """This rank's parts of whole micro-batches, and of the routing that these have from before."""
    group = parts.mesh.get_group("context")
    if group.size() == 1:
        return list(batches)
    found: list[MicroBatch] = []
    for whole in batches:
        batch, mask = cut_batch(whole.batch, whole.mask, group)
        first, last = even_cut(whole.batch.num_tokens, group.size())[group.rank() :][:2]
        routing = {name: experts[first:last] for name, experts in whole.routing.items()}
        found.append(MicroBatch(batch, mask, count_parts(batch, mask), routing))
    return found


def sum_step_counts(parts: Parts, batches: Sequence[MicroBatch]) -> Counts:
    """Counts of the step: of the parts on all ranks that hold the same layers."""
    counts = [float(count) for count in astuple(sum_counts(batches))]
    for group in parts.groups():
        counts = sum_numbers(counts, group, batches[0].mask.device)
    return Counts(*(round(count) for count in counts))
