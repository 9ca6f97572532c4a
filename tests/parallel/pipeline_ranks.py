"""Runs of test_pipeline.py on one rank."""

from __future__ import annotations

from dataclasses import astuple, replace

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from dsv4.model.batch import RaggedBatch
from dsv4.parallel.context import cut_batch
from dsv4.parallel.pipeline import end_group, keep_stage, place_of
from dsv4.parallel.sums import sum_counts_by_name, sum_gradients, sum_numbers
from dsv4.training.attention_phase import AttentionPhase
from dsv4.training.balance import update_router_biases
from dsv4.training.gradient import MicroBatch, Work, compute_gradient
from dsv4.training.losses import Counts, LossWeights, count_parts
from dsv4.training.optim import MuonAdamW
from dsv4.training.stages import Pipeline, compute_stage_gradient, gradient_norm
from tests.model.tiny import random_model, tiny_config

CPU = torch.device("cpu")
WEIGHTS = LossWeights(0.3, 0.5, 1.0)


def make_batches(lengths: list[list[int]], seed: int) -> list[MicroBatch]:
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for own in lengths:
        batch = RaggedBatch.pack([torch.randint(0, 97, (n,), generator=generator).tolist() for n in own])
        mask = torch.rand(batch.num_tokens, generator=generator) < 0.8
        mask[-1] = True
        batches.append(MicroBatch(batch, mask, count_parts(batch, mask)))
    return batches


def train(
    shape: tuple[int, int, int], sizes: list[int], lengths: list[list[int]], phases: list[AttentionPhase], mtp: int = 1
) -> tuple[float, float, float]:
    """Worst deviation over some steps from one process: losses, gradient norm, and the parameters at the end.

    shape: ranks per pipeline, data and context dimension; each of the data dimension takes its share of micro-batches.
    """
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("pipeline", "data", "context"))
    config = tiny_config(schedule=(0, 4, 128, 4), num_nextn_predict_layers=mtp)
    if not mtp:
        config = replace(config, compress_ratios=config.compress_ratios[:4])
    alone, staged = (random_model(config, 1).requires_grad_() for _ in range(2))
    place = place_of(sizes, mesh.get_local_rank("pipeline"), config.num_hidden_layers)
    keep_stage(staged, place)
    pipeline = Pipeline(place, mesh.get_group("pipeline"), end_group(mesh))
    optimizers = [MuonAdamW(model, config, compute_dtype=torch.float32) for model in (alone, staged)]
    losses = norms = 0.0
    world = dist.group.WORLD
    assert world is not None
    for step, phase in enumerate(phases):
        batches = make_batches(lengths, step)
        work = Work(0, 0, WEIGHTS, step % 2 == 1, attention=phase)
        whole = compute_gradient(alone, batches, work)
        norm = optimizers[0].gradient_norm()

        data, share = mesh.get_local_rank("data"), len(lengths) // shape[1]
        own = batches[data * share : (data + 1) * share]
        if shape[2] > 1:
            parts = [cut_batch(b.batch, b.mask, mesh.get_group("context")) for b in own]
            own = [MicroBatch(batch, mask, count_parts(batch, mask)) for batch, mask in parts]
        totals = sum((batch.counts for batch in batches), Counts())
        result = compute_stage_gradient(staged, pipeline, own, work, totals)
        for name in ("data", "context"):
            sum_gradients(staged.parameters(), mesh.get_group(name))
        own_norm = gradient_norm(staged, optimizers[1].gradient_norm(), pipeline)
        norms = max(norms, abs(own_norm - norm) / norm)
        summed = sum_numbers(astuple(result.losses), world, CPU)
        for got, want in zip(summed, astuple(whole.losses), strict=True):
            losses = max(losses, abs(got - want) / max(1.0, abs(want)))
        loads = result.loads
        for name in ("data", "context"):
            loads = sum_counts_by_name(loads, mesh.get_group(name), CPU)
        assert all(bool((loads[name] == whole.loads[name]).all()) for name in loads)
        for model, optimizer, counts in ((alone, optimizers[0], whole.loads), (staged, optimizers[1], loads)):
            optimizer.step(1e-3, 1.0, attention=phase)
            optimizer.zero_grad()
            update_router_biases(model, counts, 1e-3)
    left = dict(staged.named_parameters())
    want = dict(alone.named_parameters())
    assert left.keys() <= want.keys()
    error = torch.cat([(left[name] - want[name]).detach().flatten() for name in left]).norm()
    return losses, norms, float(error / torch.cat([want[name].detach().flatten() for name in left]).norm())
