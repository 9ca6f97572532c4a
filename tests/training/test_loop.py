"""The loop: a run killed at any step resumes to the same bits, with its stages, plan and metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import BinaryIO

import pytest
import torch

from dsv4.training.loop import NonFiniteLossError, Stage, Trainer, TrainSettings
from dsv4.training.optim import MuonAdamW
from dsv4.training.plan import FixedPlan
from dsv4.training.schedule import Schedule

SETTINGS = TrainSettings(
    Schedule(peak=0.02, warmup_steps=2, decay_fraction=0.5), balance_speed=0.01, quantized_share=0.34, save_every=2
)


@pytest.fixture
def make_trainer(stand_in, batches, split_config):
    def make(run_dir: Path, steps: int = 6, settings: TrainSettings = SETTINGS) -> Trainer:
        model = stand_in()
        run_dir.mkdir(exist_ok=True)
        stages = [Stage("first", 0.5, batches(1)), Stage("second", 0.5, batches(2))]
        optimizer = MuonAdamW(model, split_config)
        return Trainer(model, optimizer, stages, settings, FixedPlan(steps), run_dir, quiet=True)

    return make


def bits(trainer: Trainer) -> list[torch.Tensor]:
    momenta = trainer.optimizer.state_dict()["muon"].values()
    return [*trainer.model.state_dict().values(), *momenta]


@pytest.mark.parametrize("killed_after", [1, 3, 5])
def test_resume_after_a_kill_gives_the_same_bits(make_trainer, tmp_path: Path, killed_after: int) -> None:
    straight = make_trainer(tmp_path / "straight")
    straight.run()

    class Killed(Exception):
        pass

    victim = make_trainer(tmp_path / "killed")
    update, calls = victim.optimizer.step, []

    def step_then_die(*arguments: float) -> None:
        update(*arguments)
        calls.append(arguments)
        if len(calls) == killed_after:
            raise Killed  # after weights changed, before anything was saved

    victim.optimizer.step = step_then_die
    with pytest.raises(Killed):
        victim.run()
    resumed = make_trainer(tmp_path / "killed")
    assert resumed.progress.step == (killed_after - 1) // 2 * 2
    resumed.run()
    for left, right in zip(bits(straight), bits(resumed), strict=True):
        assert torch.equal(left, right)
    logs = [
        [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in path.read_text().splitlines()]
        for path in (tmp_path / "straight" / "metrics.jsonl", tmp_path / "killed" / "metrics.jsonl")
    ]
    assert logs[0] == logs[1]
    assert [entry["step"] for entry in logs[0]] == list(range(6))


def test_training_moves_weights_balances_and_learns(make_trainer, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", steps=40)
    trainer.run()
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(losses[20:]) < sum(losses[:20])
    assert trainer.finished
    bias = trainer.model.get_parameter("layers.0.ffn.gate.bias")
    assert bias[0] == -bias[1] != 0


def test_each_stage_gets_its_share_and_counts_its_own_batches(make_trainer, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run")
    trainer.run()
    assert [stage.source.asked for stage in trainer.stages] == [[0, 1, 2], [0, 1, 2]]


def test_a_failed_save_keeps_the_last_state(make_trainer, tmp_path: Path, monkeypatch) -> None:
    trainer = make_trainer(tmp_path / "run")
    trainer.run(stop_after=2)

    def half_write(state: object, file: BinaryIO) -> None:
        file.write(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr("dsv4.training.state.torch.save", half_write)
        trainer.run(stop_after=4)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["metrics.jsonl", "state.pt"]
    assert make_trainer(tmp_path / "run").progress.step == 2


def test_a_loss_that_is_not_finite_stops_before_the_update(make_trainer, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run")
    with torch.no_grad():
        trainer.model.head.weight[0, 0] = float("nan")
    before = trainer.model.embed.weight.detach().clone()
    with pytest.raises(NonFiniteLossError, match="step 0"):
        trainer.run()
    assert torch.equal(trainer.model.embed.weight, before)


def test_shares_must_add_up(make_trainer, tmp_path: Path, stand_in, split_config, batches) -> None:
    model = stand_in()
    with pytest.raises(ValueError, match="add up to 1"):
        Trainer(
            model, MuonAdamW(model, split_config), [Stage("only", 0.5, batches(1))], SETTINGS,
            FixedPlan(1), tmp_path,
        )  # fmt: skip
