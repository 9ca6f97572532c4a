"""Steps of test_rank_optim.py on one rank, beside those of one process with the same gradients."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv4.analysis.degrees import Degrees
from dsv4.parallel.fsdp import first_row
from dsv4.training.optim import MuonAdamW
from dsv4.training.plan import FixedPlan
from dsv4.training.rank_loop import RankTrainer
from tests.parallel.rank_program import make_stages, make_start, settings

WITHOUT = "mtp."  # what the second step has no gradient of


def gradient(name: str, shape: torch.Size, step: int) -> Tensor:
    """A parameter's gradient in a step. In the second, only the first row of the embedding and expert 3 have one."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + step)
    found = torch.randn(shape, generator=generator)
    if step == 1:
        if name.startswith(WITHOUT):
            found.zero_()
        elif ".experts." in name:
            found[:3] = 0.0
        elif name == "embed.weight":
            found[1:] = 0.0
    return found


def compare(folder: Path, degrees: dict[str, int], lora: str | None) -> dict[str, tuple[bool, bool, bool]]:
    """By name of what this rank steps: the bits of one process, also of moments; whether the second step moved it."""
    torch.set_num_threads(1)
    alone, chosen = make_start(lora)
    single = MuonAdamW(alone, alone.config, **chosen)
    model, _ = make_start(lora)
    trainer = RankTrainer(
        model, chosen, make_stages(["sparse"]), settings(), FixedPlan(2), folder, Degrees(**degrees), quiet=True
    )
    optimizer: Any = trainer.optimizer
    inner: MuonAdamW = optimizer._inner

    def own(name: str, whole: Tensor) -> Tensor:
        """This rank's part of a whole parameter, or of its gradient or moments."""
        count = len(inner.parameters[name])
        if count == len(whole):
            return whole
        if lora is not None:
            first = trainer.mesh.get_local_rank("expert") * count
        else:
            first = optimizer._expert_offset(name) if ".experts." in name else first_row(optimizer._sharded[name])
        return whole[first : first + count]

    muon = {rule.name for rule in single.rules if rule.kind == "muon"}

    def moments(one: MuonAdamW, name: str) -> tuple[Tensor, ...]:
        return (one.momentum_of(name),) if name in muon else one.moments_of(name)

    moved: dict[str, bool] = {}
    for step in range(3):
        for name, parameter in single.parameters.items():
            parameter.grad = gradient(name, parameter.shape, step)
            if not parameter.grad.any():
                parameter.grad = None
            if name in inner.parameters:
                inner.parameters[name].grad = own(name, gradient(name, parameter.shape, step)).clone()
        before = {name: parameter.detach().clone() for name, parameter in inner.parameters.items()}
        single.step(0.01)
        optimizer.step(0.01)
        if step == 1:
            moved = {name: not torch.equal(parameter, before[name]) for name, parameter in inner.parameters.items()}
    found: dict[str, tuple[bool, bool, bool]] = {}
    for name, parameter in inner.parameters.items():
        pairs = zip(moments(inner, name), moments(single, name), strict=True)
        same = all(torch.equal(part, own(name, whole)) for part, whole in pairs)
        found[name] = torch.equal(parameter, own(name, single.parameters[name])), same, moved[name]
    return found
