"""Faults of test_rank_faults.py on one rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from dsv4.analysis.degrees import Degrees
from dsv4.parallel.sums import gather_objects
from dsv4.training.loop import Stage
from dsv4.training.plan import FixedPlan
from dsv4.training.rank_loop import RankTrainer
from tests.parallel.rank_program import UnevenBatches, make_start, settings


@dataclass
class Fault:
    """A run of two saved steps, and the error that it then ends with on each rank."""

    folder: Path
    source: UnevenBatches
    trainer: RankTrainer

    def end(self) -> tuple[str, list[int]]:
        """Words of the error, and the steps of the whole checkpoints that it leaves."""
        try:
            self.trainer.run()
        except Exception as error:
            return f"{type(error).__name__}: {error}", self.trainer.checkpoints.steps()
        raise AssertionError("no error")


def begin(folder: Path, name: str) -> Fault:
    source = UnevenBatches()
    model, optimizer = make_start(None)
    trainer = RankTrainer(
        model, optimizer, [Stage("only", 1.0, source)], settings(), FixedPlan(6), folder / name,
        Degrees(data=dist.get_world_size()), quiet=True,
    )  # fmt: skip
    trainer.run(2)
    return Fault(folder / name, source, trainer)


def spoil_a_gradient(fault: Fault) -> None:
    """On the last rank alone."""
    optimizer = fault.trainer.sharded
    collect = optimizer.collect

    def collect_and_spoil() -> None:
        collect()
        if dist.get_rank() == dist.get_world_size() - 1:
            gradients = [p.grad for p in optimizer._inner.parameters.values() if p.grad is not None]
            gradients[0].view(-1)[0] = float("nan")

    optimizer.collect = collect_and_spoil  # pyright: ignore[reportAttributeAccessIssue]


FAULTS: dict[str, Callable[[Fault], None]] = {"gradient": spoil_a_gradient}


def run_faults(folder: Path) -> dict[str, list[tuple[str, list[int]]]]:
    """By name of the fault, the end of every rank."""
    found = {}
    for name, make in FAULTS.items():
        fault = begin(folder, name)
        make(fault)
        found[name] = gather_objects(fault.end())
    return found
