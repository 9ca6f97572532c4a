"""A step of one rank whose parameters are replicated, not sharded: gradients and losses are added up afterwards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, replace

import torch
import torch.distributed as dist
from torch import Tensor

from dsv4.model.transformer import Transformer
from dsv4.parallel.sums import sum_gradients, sum_numbers
from dsv4.training.gradient import MicroBatch, Result, Work, compute_gradient
from dsv4.training.losses import Losses
from dsv4.training.parts import Parts, cut_batches, sum_step_counts
from dsv4.training.stages import compute_stage_gradient


def compute_part_gradient(model: Transformer, parts: Parts, batches: Sequence[MicroBatch], work: Work) -> Result:
    """Leave this rank's share of the step's gradient on the parameters of its layers; return its share of the results.

    batches: whole micro-batches. Shares add up over SAME_LAYERS: `sum_over_layers`, or whatever shards the parameters.
    ValueError if the step holds no target.
    """
    own = cut_batches(parts, batches)
    totals = sum_step_counts(parts, own)
    if not totals.targets:
        raise ValueError("the step holds no target: every masked-in token is the first of its document")
    if parts.pipeline is None:
        return compute_gradient(model, own, work, totals)
    return compute_stage_gradient(model, parts.pipeline, own, work, totals)


def sum_over_layers(model: Transformer, parts: Parts) -> None:
    """Add up the gradients of the ranks that hold the same layers, where parameters are replicated."""
    for group in parts.groups():
        sum_gradients(model.parameters(), group)


def sum_part_results(parts: Parts, result: Result, model: Transformer) -> Result:
    """The step's losses, tokens and document pieces of all ranks; loads and clamps of this rank's layers."""
    loads, clamps, device = result.loads, result.clamps, model.device
    numbers = [*astuple(result.losses), float(result.tokens)]
    for group in parts.groups():
        loads, clamps = sum_counts_by_name(loads, group, device), sum_counts_by_name(clamps, group, device)
        numbers = sum_numbers(numbers, group, device)
    if parts.pipeline is not None:
        numbers = sum_numbers(numbers, parts.pipeline.group, device)
    next_token, accuracy, mtp, balance, indexer, targets, tokens = numbers
    losses = Losses(next_token, accuracy, mtp, balance, indexer, round(targets))
    return replace(result, losses=losses, loads=loads, clamps=clamps, tokens=round(tokens))


def norm_over_stages(model: Transformer, parts: Parts, own: float) -> float:
    """L2 norm of the gradients of all stages, of which this one's is `own`; the embedding counts once."""
    pipeline = parts.pipeline
    if pipeline is None:
        return own
    square = own**2
    if pipeline.place.last and not pipeline.place.first and model.embed.weight.grad is not None:
        square -= float(model.embed.weight.grad.norm()) ** 2
    return math.sqrt(max(0.0, sum_numbers([square], pipeline.group, model.device)[0]))


def sum_counts_by_name(
    counts: Mapping[str, Tensor], group: dist.ProcessGroup, device: torch.device
) -> dict[str, Tensor]:
    """Sums over the ranks of int64 tensors that all ranks have under the same names and in the same shapes."""
    if not counts:
        return {}
    flat = torch.cat([counts[name].flatten() for name in counts]).to(device)
    dist.all_reduce(flat, group=group)
    parts = flat.cpu().split([count.numel() for count in counts.values()])
    return {name: part.view_as(count) for (name, count), part in zip(counts.items(), parts, strict=True)}
