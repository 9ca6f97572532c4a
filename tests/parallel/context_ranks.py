"""Runs of test_context.py on one rank."""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dsv4.kernels import attention, backends, compressor, index_loss
from dsv4.model.batch import RaggedBatch
from dsv4.parallel.context import cut_batch
from dsv4.parallel.sums import gather_objects, sum_gradients, sum_numbers
from dsv4.training.attention_phase import AttentionPhase
from dsv4.training.gradient import MicroBatch, Work, compute_gradient
from dsv4.training.losses import Counts, LossWeights, count_parts
from tests.model.tiny import random_model, tiny_config
from tests.parallel.replicated import sum_counts_by_name


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = None
    return found


def refuse_reference() -> None:
    """With the native kernels, let the reference of what reads earlier tokens fail in this process."""

    def refused(*_: Any) -> None:
        raise AssertionError("a part of a batch has left the native kernels")

    if backends.name() == "native":
        attention.reference.attend = compressor.reference.compress = index_loss.reference.index_loss = refused


def compare(
    cases: list[tuple[list[int], list[int] | None, AttentionPhase]], numerics: str = "float", seed: int = 1
) -> list[tuple[float, float, tuple[float, str]]]:
    """Per case (lengths, cut, phase): deviations from one process: losses, all gradients together, the worst one."""
    group = dist.group.WORLD
    assert group is not None
    refuse_reference()
    config = tiny_config(schedule=(4, 128, 0, 4), num_nextn_predict_layers=1, num_hash_layers=1)
    model = random_model(config, seed, numerics).requires_grad_()
    generator = torch.Generator().manual_seed(seed)
    found = []
    for lengths, bounds, phase in cases:
        documents = [torch.randint(0, 97, (n,), generator=generator).tolist() for n in lengths]
        batch = RaggedBatch.pack(documents)
        mask = torch.rand(batch.num_tokens, generator=generator) < 0.8
        mask[-1] = True
        work = Work(0, 0, LossWeights(0.3, 0.5, 1.0), False, attention=phase)
        whole = compute_gradient(model, [MicroBatch(batch, mask, count_parts(batch, mask))], work)
        want = gradients(model)
        part, own_mask = cut_batch(batch, mask, group, bounds)
        counts = count_parts(part, own_mask)
        numbers = [counts.targets, counts.mtp_targets, counts.tokens, counts.indexed]
        totals = Counts(*(int(n) for n in sum_numbers(numbers, group, torch.device("cpu"))))
        assert totals == count_parts(batch, mask)
        result = compute_gradient(model, [MicroBatch(part, own_mask, counts)], work, totals)
        sum_gradients(model.parameters(), group)
        got = gradients(model)
        parts = zip(sum_numbers(astuple(result.losses), group, torch.device("cpu")), astuple(whole.losses), strict=True)
        losses = max(abs(got - want) / max(1.0, abs(want)) for got, want in parts)
        loads = sum_counts_by_name(result.loads, group, torch.device("cpu"))
        assert [n for part in gather_objects(result.lengths, group) for n in part] == lengths
        assert all(bool((loads[name] == whole.loads[name]).all()) for name in whole.loads)
        size = float(torch.cat([gradient.flatten() for gradient in want.values()]).norm())
        error = torch.cat([(got[name] - want[name]).flatten() for name in want]).norm()
        single = [(float((got[n] - want[n]).norm() / want[n].norm().clamp(min=1e-5 * (size or 1.0))), n) for n in want]
        # Documents too short for an entry have no gradient in a warm-up.
        found.append((losses, float(error) / (size or 1.0), max(single)))
    return found
