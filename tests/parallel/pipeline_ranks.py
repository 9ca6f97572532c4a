"""Runs of test_pipeline.py on one rank."""

from __future__ import annotations

from dataclasses import astuple

import torch

from dsv4.analysis.degrees import Degrees
from dsv4.model.batch import RaggedBatch
from dsv4.parallel.mesh import batch_rank, make_mesh
from dsv4.training.attention_phase import AttentionPhase
from dsv4.training.balance import update_router_biases
from dsv4.training.gradient import MicroBatch, Work, compute_gradient
from dsv4.training.losses import LossWeights, count_parts
from dsv4.training.optim import MuonAdamW
from dsv4.training.parts import place_rank
from tests.model.tiny import random_model, tiny_config
from tests.parallel.replicated import compute_part_gradient, norm_over_stages, sum_over_layers, sum_part_results

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
    pipeline, data, context = shape
    mesh = make_mesh(Degrees(pipeline=pipeline, data=data, context=context))
    ratios = (0, 4, 128, 4, 0)[: 4 + mtp]
    config = tiny_config(compress_ratios=ratios, num_hidden_layers=4, num_nextn_predict_layers=mtp)
    alone, staged = (random_model(config, 1).requires_grad_() for _ in range(2))
    parts = place_rank(staged, mesh, sizes)
    optimizers = [MuonAdamW(model, config, compute_dtype=torch.float32) for model in (alone, staged)]
    losses = norms = 0.0
    for step, phase in enumerate(phases):
        batches = make_batches(lengths, step)
        work = Work(0, 0, WEIGHTS, step % 2 == 1, attention=phase)
        whole = compute_gradient(alone, batches, work)
        norm = optimizers[0].gradient_norm()
        first, share = batch_rank(mesh), len(lengths) // data
        own = compute_part_gradient(staged, parts, batches[first * share : (first + 1) * share], work)
        sum_over_layers(staged, parts)
        norms = max(norms, abs(norm_over_stages(staged, parts, optimizers[1].gradient_norm()) - norm) / norm)
        result = sum_part_results(parts, own, staged)
        assert result.tokens == whole.tokens
        for got, want in zip(astuple(result.losses), astuple(whole.losses), strict=True):
            losses = max(losses, abs(got - want) / max(1.0, abs(want)))
        loads = result.loads
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
