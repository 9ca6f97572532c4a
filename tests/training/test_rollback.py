"""Rollback: from a spike back to a kept state, with the data in the same order; bounded, recorded, resumable."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv4.training.kept_states import KeptStates
from dsv4.training.loop import NonFiniteLossError, Stage, Trainer, TrainSettings
from dsv4.training.optim import MuonAdamW
from dsv4.training.plan import FixedPlan
from dsv4.training.schedule import Schedule
from dsv4.training.spikes import SpikeSettings
from dsv4.training.stability import SpikeError
from dsv4.training.stability_settings import StabilitySettings

STABILITY = StabilitySettings(SpikeSettings(window=16, fewest=8), margin=3, anticipate_steps=10)
SETTINGS = TrainSettings(
    Schedule(peak=0.01, warmup_steps=2, decay_fraction=0.5), quantized_share=0.0, save_every=5, stability=STABILITY
)
STEPS, HURT = 50, 22  # the step before which the weights are damaged

MakeTrainer = Callable[..., Trainer]


@pytest.fixture
def make_trainer(stand_in, batches, split_config) -> MakeTrainer:
    def make(run_dir: Path, source: Any = None, **changes: Any) -> Trainer:
        model = stand_in()
        stage = Stage("only", 1.0, source or batches(1))
        settings = replace(SETTINGS, **changes)
        return Trainer(model, MuonAdamW(model, split_config), [stage], settings, FixedPlan(STEPS), run_dir, quiet=True)

    return make


def hurt(trainer: Trainer, value: float = 30.0) -> None:
    """Train to HURT, then multiply the head's weights, which no state on disk has."""
    trainer.run(stop_after=HURT)
    with torch.no_grad():
        trainer.model.head.weight *= value


def lines(trainer: Trainer) -> list[dict[str, Any]]:
    text = (trainer.run_dir / "metrics.jsonl").read_text()
    return [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in text.splitlines()]


def rollbacks(trainer: Trainer) -> list[dict[str, Any]]:
    return [line for line in lines(trainer) if line.get("event") == "rollback"]


def same_bits(left: Trainer, right: Trainer) -> bool:
    states = [[*t.model.state_dict().values(), *t.optimizer.momenta()] for t in (left, right)]
    return all(torch.equal(a, b) for a, b in zip(*states, strict=True))


@pytest.mark.parametrize("value", [30.0, float("nan")])
def test_a_run_goes_back_and_ends_as_if_nothing_had_happened(
    make_trainer: MakeTrainer, tmp_path: Path, value: float
) -> None:
    healthy = make_trainer(tmp_path / "healthy")
    healthy.run()
    assert rollbacks(healthy) == []
    trainer = make_trainer(tmp_path / "hurt")
    hurt(trainer, value)
    trainer.run()
    (event,) = rollbacks(trainer)
    seen = HURT + (value == value)  # a loss that is not finite needs no second step
    assert (event["step"], event["spike_start"], event["to"], event["attempt"]) == (seen, HURT, 15, 0)
    assert trainer.stages[0].source.asked == [*range(seen + 1), *range(15, STEPS)]
    assert same_bits(healthy, trainer)
    assert [(line["attempt"], line["step"]) for line in lines(trainer)] == [
        *((0, step) for step in range(seen)), (0, seen), *((1, step) for step in range(15, STEPS)),
    ]  # fmt: skip


def test_anticipatory_routing_is_on_from_the_rollback_and_then_off(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run")
    hurt(trainer)
    trainer.run()
    on = {line["step"] for line in lines(trainer) if line.get("anticipatory")}
    assert on == {*range(15, HURT + 1 + 10)}
    assert rollbacks(trainer)[0]["anticipatory_until"] == HURT + 1 + 10


@pytest.mark.parametrize("stop", [16, 20, 33])
def test_a_run_killed_after_a_rollback_resumes_to_the_same_bits_and_lines(
    make_trainer: MakeTrainer, tmp_path: Path, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = make_trainer(tmp_path / "straight")
    hurt(straight)
    straight.run()
    victim = make_trainer(tmp_path / "killed")
    hurt(victim)
    update = victim.optimizer.step

    def die(*arguments: float) -> None:
        update(*arguments)
        if rollbacks(victim) and victim.progress.step == stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(victim.optimizer, "step", die)
    with pytest.raises(KeyboardInterrupt):
        victim.run()
    resumed = make_trainer(tmp_path / "killed")
    assert resumed.progress.step == stop // 5 * 5
    resumed.run()
    assert same_bits(straight, resumed)
    assert lines(straight) == lines(resumed)


class HardFrom:
    """Batches that turn into another kind at a step and stay so: a jump of the loss that every replay meets again."""

    def __init__(self, batches: Any, step: int) -> None:
        self.batches, self.step = batches, step

    def batch(self, step: int, /) -> Any:
        made = self.batches.batch(step)
        if step < self.step:
            made.documents = [[1] * len(document) for document in made.documents]
        return made


def test_rollbacks_for_one_spike_go_further_back_and_end(make_trainer: MakeTrainer, tmp_path: Path, batches) -> None:
    four = replace(STABILITY, keep=4)
    trainer = make_trainer(tmp_path / "run", HardFrom(batches(1), 30), stability=four)
    with pytest.raises(SpikeError, match=r"step 31: loss .* since step 30, after 3 rollbacks; nothing was updated"):
        trainer.run()
    assert [event["to"] for event in rollbacks(trainer)] == [25, 20, 15]
    resumed = make_trainer(tmp_path / "run", HardFrom(batches(1), 30), stability=four)
    assert resumed.progress.step == 30  # the last save before the error
    with pytest.raises(SpikeError):
        resumed.run()


def test_a_run_may_go_on_after_its_last_rollback(make_trainer: MakeTrainer, tmp_path: Path, batches) -> None:
    on = replace(STABILITY, max_rollbacks=1, after_last="continue")
    trainer = make_trainer(tmp_path / "run", HardFrom(batches(1), 30), stability=on)
    trainer.run()
    assert trainer.finished and len(rollbacks(trainer)) == 1


def test_a_loss_that_stays_not_finite_stops_the_run(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run")
    trainer.run(stop_after=HURT)
    gradient = trainer.optimizer.gradient_norm
    trainer.optimizer.gradient_norm = lambda: float("inf") if trainer.progress.step == HURT else gradient()
    with pytest.raises(NonFiniteLossError, match="gradient norm inf"):
        trainer.run()
    assert len(rollbacks(trainer)) == 3


def test_a_new_run_can_go_back_to_its_first_step(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", save_every=1000)
    update = trainer.optimizer.step

    def step(*arguments: float) -> None:
        update(*arguments)
        if trainer.progress.step == HURT - 1 and not rollbacks(trainer):
            with torch.no_grad():
                trainer.model.head.weight *= 30.0

    trainer.optimizer.step = step
    trainer.run()
    assert [event["to"] for event in rollbacks(trainer)] == [0]


def test_few_states_are_kept_and_none_of_a_spike(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", save_every=1)
    hurt(trainer)
    trainer.run(stop_after=HURT + 1)  # the first high step is saved, to resume from, and not kept
    assert trainer.progress.step == HURT + 1
    assert KeptStates(tmp_path / "run" / "kept", 3).steps() == [HURT - 2, HURT - 1, HURT]
    trainer.run()
    assert KeptStates(tmp_path / "run" / "kept", 3).steps() == [STEPS - 2, STEPS - 1, STEPS]


def test_a_kept_state_takes_no_space_of_its_own_until_the_next_save(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run")
    trainer.run(stop_after=10)
    assert (tmp_path / "run" / "state.pt").samefile(tmp_path / "run" / "kept" / "step-000000010.pt")


def test_states_are_copied_where_links_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Path) -> None:
        raise OSError("no links here")

    monkeypatch.setattr("dsv4.training.kept_states.os.link", refuse)
    (tmp_path / "state.pt").write_bytes(b"state")
    kept = KeptStates(tmp_path / "kept", 1)
    kept.keep(tmp_path / "state.pt", 7)
    assert kept.steps() == [7] and kept.path(7).read_bytes() == b"state"


def test_settings_out_of_range_are_named() -> None:
    with pytest.raises(ValueError, match="keep is 0; allowed: 1 or more"):
        StabilitySettings(keep=0)
