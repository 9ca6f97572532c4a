"""Faults in the middle of a run: each is an error in words, the last state stays as it was, and the run goes on to the
same bits once the cause is gone. Kills at random steps, resumed on other numbers of processes."""

from __future__ import annotations

import os
import random
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from dsv4.data.shards import ShardError
from dsv4.training.loop import NonFiniteLossError, Stage, Trainer, TrainSettings
from dsv4.training.plan import FixedPlan
from dsv4.training.replicas import ReplicaError
from dsv4.training.schedule import Schedule

from .tiny_training import Rows, draw_documents, make_model

STEPS = 6
SETTINGS = TrainSettings(Schedule(peak=0.02, warmup_steps=1), quantized_share=0.3, save_every=2, micro_batches=2)
Fault = Literal["none", "no targets", "wrong shard", "vanished rank"]


@dataclass
class Source:
    """Two micro-batches per step, from step `at` on with a fault. Pickled to the helpers with it."""

    fault: Fault
    at: int
    main_process: int

    def batch(self, step: int, /) -> Rows:
        documents = draw_documents(step, 30, 9)
        if step // 2 < self.at:
            return Rows(documents)
        if self.fault == "no targets":
            return Rows(documents, [[0] * len(document) for document in documents])
        if self.fault == "wrong shard":
            raise ShardError("shards/shard-00017.arrow is damaged")
        if self.fault == "vanished rank" and os.getpid() != self.main_process:
            os.kill(os.getpid(), signal.SIGKILL)
        return Rows(documents)


def make_trainer(folder: Path, fault: Fault = "none", at: int = STEPS, replicas: int = 1) -> Trainer:
    model, optimizer = make_model()
    settings = replace(SETTINGS, replicas=replicas, micro_batches=2 // replicas)
    stages = [Stage("only", 1.0, Source(fault, at, os.getpid()))]
    return Trainer(model, optimizer, stages, settings, FixedPlan(STEPS), folder, quiet=True)


def tensors(trainer: Trainer) -> dict[str, Any]:
    return trainer.model.state_dict() | trainer.optimizer.state_dict()["muon"]


def assert_same(left: Trainer, right: Trainer) -> None:
    found = tensors(right)
    for name, tensor in tensors(left).items():
        assert torch.equal(tensor, found[name]), name


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    trainer = make_trainer(tmp_path_factory.mktemp("straight"))
    trainer.run()
    return trainer


@pytest.mark.parametrize(
    ("fault", "replicas", "kind", "words"),
    [
        ("no targets", 1, ValueError, r"batches \d+ to \d+ of stage 0 hold no target"),
        ("wrong shard", 1, ShardError, "shard-00017.arrow is damaged"),
        ("vanished rank", 2, ReplicaError, "replica 1 of 2 was ended by SIGKILL"),
    ],
)
def test_a_fault_is_said_and_the_run_goes_on_without_it(
    straight: Trainer, tmp_path: Path, fault: Fault, replicas: int, kind: type[Exception], words: str
) -> None:
    at = random.Random(fault).randrange(3, STEPS - 1)
    make_trainer(tmp_path).run(stop_after=2)
    saved = tmp_path / "state.pt"
    with pytest.raises(kind, match=words):
        make_trainer(tmp_path, fault, at, replicas).run()
    before, kept = saved.read_bytes(), torch.load(saved)["progress"]["step"]
    assert kept == at // 2 * 2
    if replicas == 1:
        with pytest.raises(kind, match=words):  # again while the cause is there
            make_trainer(tmp_path, fault, at).run()
        assert saved.read_bytes() == before
    resumed = make_trainer(tmp_path)
    assert resumed.progress.step == kept
    resumed.run()
    assert_same(straight, resumed)


def test_weights_that_are_not_finite_end_the_run_with_the_last_state(straight: Trainer, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.run(stop_after=4)
    before = (tmp_path / "state.pt").read_bytes()
    with torch.no_grad():
        trainer.model.head.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteLossError, match="step 4, stage only: next_token nan"):
        trainer.run()
    assert (tmp_path / "state.pt").read_bytes() == before
    resumed = make_trainer(tmp_path)
    resumed.run()
    assert_same(straight, resumed)


def test_kills_at_random_steps_on_any_number_of_processes_leave_the_same_bits(
    straight: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(11)
    for replicas in (2, 1):
        victim = make_trainer(tmp_path, replicas=replicas)
        last, update = draw.randrange(victim.progress.step, STEPS), victim.optimizer.step

        def die(*arguments: Any, victim: Trainer = victim, last: int = last, update: Any = update) -> None:
            update(*arguments)
            if victim.progress.step == last:
                raise KeyboardInterrupt

        monkeypatch.setattr(victim.optimizer, "step", die)
        with pytest.raises(KeyboardInterrupt):
            victim.run()
    resumed = make_trainer(tmp_path)
    resumed.run()
    assert_same(straight, resumed)
