"""A step of test_zero.py on one rank."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv4.analysis.degrees import Degrees
from dsv4.parallel.fsdp import local_part
from dsv4.training.plan import FixedPlan
from dsv4.training.rank_loop import RankTrainer
from tests.parallel.rank_program import make_stages, make_start, settings


def count_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Of tensors that are there once, however often they are given."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors if tensor is not None}.values())


def step_bytes(folder: Path, degrees: dict[str, int]) -> dict[str, int]:
    """Bytes that this rank holds by kind as the optimizer begins its step."""
    torch.set_num_threads(1)
    found: dict[str, int] = {}
    model, optimizer = make_start(None)
    trainer = RankTrainer(
        model, optimizer, make_stages(["sparse"]), settings(), FixedPlan(2), folder, Degrees(**degrees), quiet=True
    )
    sharded: Any = trainer.optimizer
    step = sharded.step

    def measure(*arguments: Any) -> None:
        rows, own = list(model.parameters()), list(sharded._own.values())
        inner = sharded._inner
        moments = [moment for state in inner._adamw.state.values() for key, moment in state.items() if key != "step"]
        found["masters"] = count_bytes(map(local_part, [*rows, *own]))
        found["gradients"] = count_bytes(local_part(p.grad) for p in (*rows, *own) if p.grad is not None)
        found["momenta"] = count_bytes([*inner.momenta(), *moments])
        step(*arguments)

    sharded.step = measure
    trainer.run(1)
    return found
