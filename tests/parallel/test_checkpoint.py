"""Checkpoints of ranks: after a kill all that count are whole, and what is left over stops nothing."""

from __future__ import annotations

import json
import os
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
from dsv4.training.handover import pack_run, take_checkpoint, unpack_run
from dsv4.training.loop import Stage
from dsv4.training.optim import MuonAdamW
from dsv4.training.plan import FixedPlan
from dsv4.training.rank_loop import RankTrainer
from dsv4.training.state import RunPosition, StateError

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


def killed_by_the_rename(checkpoints: Checkpoints, pattern: str, step: int, value: float) -> None:
    """Save a checkpoint up to the rename of a folder whose name begins with `pattern`."""
    rename = Path.rename

    def killed(path: Path, target: Path) -> Path:
        if path.name.startswith(pattern):
            raise Killed
        return rename(path, target)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "rename", killed)
        save(checkpoints, step, value)


def names(checkpoints: Checkpoints) -> list[str]:
    return sorted(path.name for path in checkpoints.folder.iterdir())


def test_a_kill_between_the_renames_of_a_replacement_leaves_what_was_there(checkpoints: Checkpoints) -> None:
    save(checkpoints, 2, 1.0)
    killed_by_the_rename(checkpoints, "writing-", 2, 2.0)
    assert checkpoints.steps() == []
    again = Checkpoints(checkpoints.folder)
    assert again.steps() == [2] and load(again, 2) == 1.0
    save(again, 2, 3.0)
    assert load(again, 2) == 3.0 and names(again) == ["step-2"]


def test_one_process_goes_on_from_a_replacement_that_was_cut_short(checkpoints: Checkpoints) -> None:
    save(checkpoints, 2, 1.0)
    killed_by_the_rename(checkpoints, "writing-", 2, 2.0)
    model, optimizer = make_start(None)
    # As far as the checkpoint is read, which is of another model.
    with pytest.raises(StateError, match="step-2 is damaged or of another model"):
        take_checkpoint(checkpoints.folder.parent, model, MuonAdamW(model, model.config, **optimizer))


def test_what_killed_runs_set_aside_goes_with_the_next_start(checkpoints: Checkpoints) -> None:
    """Never one that was being removed, of which a part may be gone, nor one with a later step."""
    save(checkpoints, 4, 1.0)
    killed_by_the_rename(checkpoints, "replaced-", 4, 2.0)
    shutil.copytree(checkpoints.path(4), checkpoints.folder / "replaced-2")
    shutil.copytree(checkpoints.path(4), checkpoints.folder / "gone-6")
    assert names(checkpoints) == ["gone-6", "replaced-2", "replaced-4", "step-4"]
    again = Checkpoints(checkpoints.folder)
    assert names(again) == ["step-4"] and load(again, 4) == 2.0


def test_what_a_checkpoint_holds_besides_its_tensors_is_synced(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[int] = set()
    fsync = os.fsync

    def note(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    checkpoints.start(2, {"weight": torch.zeros(3)}, {"step": 2}, {"routing": torch.ones(2)})
    checkpoints.finish()
    assert {path.stat().st_ino for path in checkpoints.path(2).iterdir()} <= synced


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_rank_takes_its_random_state_of_as_many_ranks(ranks: int) -> None:
    states = []
    with torch.random.fork_rng(devices=[]):
        for seed in range(2):
            torch.manual_seed(seed)
            states.append(torch.get_rng_state())
        detector = {"phase": [], "history": {}, "high_since": 5}
        progress = RunPosition(7, 1, 3, 900, 2.5, {"detector": detector, "rollbacks": 1})
        position, common, suspected = pack_run(progress, {"sparse": 4, "dense": 3, "warmup": 0}, states)
        assert suspected and json.loads(json.dumps(position)) == position
        torch.manual_seed(9)
        before = torch.get_rng_state()
        found, updates = unpack_run(position, common, 1, ranks)
        assert torch.equal(torch.get_rng_state(), states[1] if ranks == 2 else before)
    assert found == progress and updates == {"sparse": 4, "dense": 3, "warmup": 0}
    assert pack_run(RunPosition(), updates, states)[1:] == ({}, False)


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
