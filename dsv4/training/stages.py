"""Forward and backward of one pipeline stage in a step: losses, auxiliary losses of every stage, the embedding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dsv4.model.transformer import Transformer
from dsv4.parallel.pipeline import StagePlace, run_stages, with_loss
from dsv4.parallel.sums import sum_gradients
from dsv4.training.gradient import MicroBatch, Result, Work, make_result, start_aux, step_numerics, sum_results
from dsv4.training.losses import Counts, Losses, auxiliary_losses, losses_of_streams
from dsv4.training.recompute import recomputing


@dataclass(frozen=True)
class Pipeline:
    """This rank's stage, the ranks of its pipeline, and those with an embedding (end_group; None on other stages)."""

    place: StagePlace
    group: dist.ProcessGroup
    ends: dist.ProcessGroup | None


def compute_stage_gradient(
    model: Transformer, pipeline: Pipeline, batches: Sequence[MicroBatch], work: Work, totals: Counts
) -> Result:
    """As `compute_gradient`, for this rank's stage of `model`: its gradients, and its shares of losses and loads.

    The results of all stages add up to the step's; tokens, lengths and targets are the last stage's. The embedding's
    gradients are those of both ends.
    """
    place, results = pipeline.place, [Result(Losses(0.0, 0.0, 0.0, 0.0, 0.0, 0), {}, 0)] * len(batches)

    def compute(number: int, streams: Tensor | None) -> Tensor:
        data = batches[number]
        aux = start_aux(model.config, data, work, totals)
        out = model.run_stage(data.batch, streams, aux)
        if place.last:
            out, losses = losses_of_streams(model, out, data.batch, data.mask, work.weights, aux, totals)
        else:
            loss, balance, indexer = auxiliary_losses(data.batch, work.weights, aux, totals)
            out = with_loss(out, loss)
            losses = Losses(0.0, 0.0, 0.0, float(balance.detach()), float(indexer.detach()), 0)
        results[number] = make_result(losses, aux, data.batch if place.last else None)
        return out

    config = model.config
    shape = torch.empty(1, config.hc_mult, config.hidden_size, dtype=model.dtype, device=model.device)
    with step_numerics(model, work, whole=False), recomputing(model, work.recompute):
        run_stages(place, pipeline.group, [data.batch.num_tokens for data in batches], shape, compute)
    if pipeline.ends is not None and pipeline.ends.size() > 1 and config.num_nextn_predict_layers:
        sum_gradients([model.embed.weight], pipeline.ends)
    return sum_results(results)
