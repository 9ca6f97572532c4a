"""Checkpoints of ranks: after a kill all that count are whole, and what is left over stops nothing."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from dsv4.analysis.degrees import Degrees
from dsv4.parallel.checkpoint import Checkpoints
from dsv4.training.loop import Stage
from dsv4.training.plan import FixedPlan
from dsv4.training.rank_loop import RankTrainer

from ..training.tiny_training import Rows
from .rank_program import UnevenBatches, make_start, settings


class Killed(BaseException):
    """End of the process, as by SIGKILL: nothing handles it."""


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.fixture
def checkpoints(one_rank: None, tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", 3)


def save(checkpoints: Checkpoints, step: int, value: float) -> None:
    checkpoints.start(step, {"weight": torch.full((3,), value)}, {"step": step})
    checkpoints.finish()


def load(checkpoints: Checkpoints, step: int) -> float:
    tensors = {"weight": torch.zeros(3)}
    position, _ = checkpoints.load(checkpoints.path(step), tensors)
    assert position == {"step": step}
    return float(tensors["weight"][0])


def test_a_checkpoint_removed_in_part_counts_no_more(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (2, 4, 6):
        save(checkpoints, step, float(step))

    def cut_short(path: Path, ignore_errors: bool = False) -> None:
        if path.is_dir():
            next(path.iterdir()).unlink()
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(shutil, "rmtree", cut_short)
        checkpoints.drop_after(2)
    assert checkpoints.steps() == [2, 4] and [load(checkpoints, step) for step in (2, 4)] == [2.0, 4.0]
    checkpoints.drop_after(2)
    assert checkpoints.steps() == [2]


def test_what_a_killed_run_set_aside_does_not_stop_a_later_one(checkpoints: Checkpoints) -> None:
    save(checkpoints, 2, 1.0)
    shutil.copytree(checkpoints.path(2), checkpoints.folder / "old-2")
    save(checkpoints, 2, 2.0)
    assert load(checkpoints, 2) == 2.0 and checkpoints.steps() == [2]
    assert not (checkpoints.folder / "old-2").exists()


def test_a_checkpoint_counts_once_it_is_written_and_not_only_at_the_next(one_rank: None, tmp_path: Path) -> None:
    found: dict[int, list[int]] = {}

    class Watching(UnevenBatches):
        def batch(self, step: int, /) -> Rows:
            found[step] = trainer.checkpoints.steps()
            while trainer.checkpoints.writing:
                time.sleep(0.01)
            return super().batch(step)

    model, optimizer = make_start(None)
    trainer = RankTrainer(
        model, optimizer, [Stage("only", 1.0, Watching())], settings(save_every=3), FixedPlan(6), tmp_path, Degrees(),
        quiet=True,
    )  # fmt: skip
    trainer.run(5)
    assert found[4] == [3]
