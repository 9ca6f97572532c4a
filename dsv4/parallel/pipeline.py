"""Pipeline parallelism: stages of blocks on different ranks, on the schedules of torch.distributed.pipelining.

The first stage has the embedding; the last the read-out, the head, the MTP block, and for it a copy of the embedding,
whose gradients are added to the first's. Streams [T, hc_mult, d] go from stage to stage. Micro-batches have any number
of tokens, but torch receives into buffers of one shape: streams travel with rows of zeros behind them, up to the
longest micro-batch of the step, and no layer sees these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from dsv4.model.transformer import Transformer


@dataclass(frozen=True)
class StagePlace:
    """A stage: its number, the number of stages, and its main layers."""

    index: int
    count: int
    layers: range

    @property
    def first(self) -> bool:
        return self.index == 0

    @property
    def last(self) -> bool:
        return self.index == self.count - 1

    @property
    def copies(self) -> frozenset[str]:
        """Parameters that an earlier stage has too."""
        return frozenset({"embed.weight"}) if self.last and not self.first else frozenset()


def place_of(sizes: Sequence[int], index: int, num_layers: int) -> StagePlace:
    """Stage `index` of stages with `sizes` layers. ValueError unless these are all layers, one per stage at least."""
    if sum(sizes) != num_layers or min(sizes) < 1:
        raise ValueError(
            f"stages of {list(sizes)} layers; allowed: numbers of at least 1 that add up to the model's {num_layers}"
        )
    begin = sum(sizes[:index])
    return StagePlace(index, len(sizes), range(begin, begin + sizes[index]))


class Elsewhere(nn.Module):
    """In place of a module that another stage has: a layer that leaves the streams as they are."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.weight = like.detach().new_empty(0)  # its device and dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Elsewhere:
        self.weight = fn(self.weight)
        return super()._apply(fn, recurse)

    def forward(self, streams: Tensor, ctx: object) -> Tensor:
        return streams


def keep_stage(model: Transformer, place: StagePlace) -> None:
    """Drop all parameters of the other stages; those that stay keep their names."""
    like = model.embed.weight
    for index in range(len(model.layers)):
        if index not in place.layers:
            model.layers[index] = Elsewhere(like)
    fuses = place.last and len(model.mtp) > 0
    if not (place.first or fuses):
        model.embed = Elsewhere(like)  # pyright: ignore[reportAttributeAccessIssue]
    if not place.last:
        model.norm = model.head = Elsewhere(like)  # pyright: ignore[reportAttributeAccessIssue]
        model.mtp = nn.ModuleList()
        model.hc_head_fn = model.hc_head_base = model.hc_head_scale = None  # pyright: ignore[reportAttributeAccessIssue]


def end_group(mesh: DeviceMesh, name: str = "pipeline") -> dist.ProcessGroup | None:
    """Group of the first and the last stage on this rank's pipeline, for the embedding; None on other stages.

    All ranks of the mesh must call this.
    """
    names = mesh.mesh_dim_names
    assert names is not None
    pipelines = mesh.mesh.movedim(names.index(name), -1).flatten(0, -2)
    ends = [sorted({ranks[0], ranks[-1]}) for ranks in pipelines.tolist()]
    group = dist.new_subgroups_by_enumeration(ends)[0]
    return group if isinstance(group, dist.ProcessGroup) else None


def with_loss(streams: Tensor, loss: Tensor) -> Tensor:
    """The streams; in the backward `loss`, of this stage alone, gets a gradient of 1."""
    return _WithLoss.apply(streams, loss) if loss.requires_grad else streams


class _WithLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, streams: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(torch.ones_like(loss))
        return streams.view_as(streams)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, ctx.saved_tensors[0]


class _StageModule(nn.Module):
    """Stage of one step, for PipelineStage: micro-batches come in order, streams padded to `rows` tokens."""

    def __init__(
        self, place: StagePlace, compute: Callable[[int, Tensor | None], Tensor], tokens: Sequence[int]
    ) -> None:
        super().__init__()
        self.place, self.compute, self.tokens, self.done = place, compute, tokens, 0

    def forward(self, received: Tensor) -> Tensor:
        number, self.done = self.done, self.done + 1
        tokens = self.tokens[number]
        out = self.compute(number, None if self.place.first else received[:tokens])
        if self.place.last:
            return out
        out = F.pad(out, (0, 0, 0, 0, 0, max(self.tokens) - tokens))
        return out if out.requires_grad else out.requires_grad_()  # torch runs a backward of every stage


def run_stages(
    place: StagePlace,
    group: dist.ProcessGroup,
    tokens: Sequence[int],
    streams: Tensor,
    compute: Callable[[int, Tensor | None], Tensor],
) -> None:
    """Forward and backward of a step's micro-batches through this rank's stage: 1F1B, or GPipe if they are too few.

    tokens: of each micro-batch. streams: of one token, [1, hc_mult, d], for their shape and dtype. compute(number,
    streams of the stage before [T, hc_mult, d], None on the first stage): this stage's streams, on the last stage the
    loss. Losses add up. All ranks of the group have the same micro-batches.
    """
    device, count = streams.device, len(tokens)
    moving = torch.empty(max(tokens), *streams.shape[1:], dtype=streams.dtype, device="meta", requires_grad=True)
    loss = torch.empty((), device="meta", requires_grad=True)
    numbers = torch.arange(count, device=device)
    stage = PipelineStage(
        _StageModule(place, compute, tokens),
        place.index,
        place.count,
        device,
        input_args=numbers[:1] if place.first else moving,
        output_args=loss if place.last else moving,
        group=group,
    )
    kind = Schedule1F1B if count >= place.count else ScheduleGPipe
    schedule = kind(stage, count, loss_fn=lambda loss, _: loss, scale_grads=False)
    arguments = (numbers,) if place.first else ()
    schedule.step(*arguments, target=numbers if place.last else None, return_outputs=False)
