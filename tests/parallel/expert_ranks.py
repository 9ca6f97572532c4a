"""Gradients of test_expert.py on one rank."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dsv4.analysis.degrees import Degrees
from dsv4.checkpoint import save_model
from dsv4.kernels.stored import StoredStack
from dsv4.model.transformer import Transformer
from dsv4.parallel.expert import split_experts
from dsv4.parallel.mesh import make_mesh
from dsv4.parallel.sums import gather_objects, sum_gradients
from dsv4.training.gradient import Work, compute_gradient, pack_batch
from dsv4.training.lora import load_adapted
from dsv4.training.lora_settings import LoraSettings
from dsv4.training.losses import LossWeights
from dsv4.training.parts import Parts, sum_step_counts
from tests.parallel.rank_program import make_start
from tests.training.tiny_training import CONFIG, Rows, draw_documents, make_model

WORK = Work(0, 0, LossWeights(0.3, 0.5, 1.0), False)


def compare(cases: Sequence[tuple[list[list[int]], int | None, list[str] | None, bool]]) -> list[float]:
    """Per case, deviation of all gradients together from one process's, relative to their norm.

    A case: lengths of each rank's documents, rank whose documents have no targets, targets of adapters, and whether
    these are on weights that stay as they are stored.
    """
    return [_compare(*case) for case in cases]


def _start(targets: list[str] | None, stored: bool) -> Transformer:
    if not stored:
        return make_start(None if targets is None else "muon", targets or ())[0]
    settings, (model, _) = LoraSettings(3, 6.0, tuple(targets or ())), make_model()
    with TemporaryDirectory() as folder:
        save_model(model, model.config, Path(folder) / "base")
        return load_adapted(Path(folder) / "base", settings, torch.device("cpu"), torch.Generator().manual_seed(5))


def _compare(lengths: list[list[int]], without_targets: int | None, targets: list[str] | None, stored: bool) -> float:
    rank, group = dist.get_rank(), dist.group.WORLD
    assert group is not None
    rows = [Rows(draw_documents(seed, *of)) for seed, of in enumerate(lengths)]
    if without_targets is not None:
        masks = rows[without_targets].loss_masks
        masks[:] = [[0] * len(mask) for mask in masks]
    batches = [pack_batch(row, torch.device("cpu")) for row in rows]
    whole, own = (_start(targets, stored) for _ in range(2))
    compute_gradient(whole, batches, WORK)
    want = _gradients(whole)
    mesh = make_mesh(Degrees(expert=len(lengths)))
    split_experts(own, mesh["expert"])
    stacks = [p for name, p in own.named_parameters() if ".experts.w" in name]
    assert all(len(stack) == CONFIG.n_routed_experts // len(lengths) for stack in stacks)
    assert all(isinstance(stack, StoredStack) == stored for stack in stacks)
    totals = sum_step_counts(Parts(mesh, None), batches[rank : rank + 1])
    compute_gradient(own, batches[rank : rank + 1], WORK, totals)
    sum_gradients((p for name, p in own.named_parameters() if ".experts." not in name), group)
    got = _gradients(own)
    got |= {name: torch.cat(gather_objects(grad)) for name, grad in got.items() if ".experts." in name}
    size = torch.stack([gradient.norm() for gradient in want.values()]).norm()
    return float(torch.stack([(got[name] - want[name]).norm() for name in want]).norm() / size)


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    named = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in named}
