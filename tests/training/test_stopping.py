"""SIGTERM and Ctrl-C: the step in progress is finished and saved; helper processes leave the end to the main one."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from dsv4.training.loop import Stage, Trainer, TrainSettings
from dsv4.training.plan import FixedPlan
from dsv4.training.schedule import Schedule
from dsv4.training.stopping import RunStoppedError, StopOnSignal

from .tiny_training import Rows, draw_documents, make_model


@dataclass
class Stopping:
    """Batches, of which number `at` sends a signal to the process that asks for it."""

    at: int | None
    number: signal.Signals = signal.SIGTERM

    def batch(self, step: int, /) -> Rows:
        if step == self.at:
            os.kill(os.getpid(), self.number)
        return Rows(draw_documents(step, 30, 9))


def make_trainer(folder: Path, at: int | None, replicas: int = 1, number: signal.Signals = signal.SIGTERM) -> Trainer:
    model, optimizer = make_model()
    settings = TrainSettings(Schedule(peak=0.02, warmup_steps=1), replicas=replicas)
    return Trainer(
        model, optimizer, [Stage("only", 1.0, Stopping(at, number))], settings, FixedPlan(4), folder, quiet=True
    )


@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
def test_a_stopped_run_is_saved_and_goes_on_to_the_same_bits(
    number: signal.Signals, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    straight = make_trainer(tmp_path / "straight", None)
    straight.run()
    before = signal.getsignal(number)
    stopped = make_trainer(tmp_path / "run", 1, number=number)
    with pytest.raises(RunStoppedError, match=f"by {name} after step 2 of 4; the state is saved in .*pt") as error:
        stopped.run()
    assert signal.getsignal(number) == before and error.value.status == 128 + number
    assert ("once more ends at once" in capsys.readouterr().err) == (number == signal.SIGINT)
    resumed = make_trainer(tmp_path / "run", None)
    assert resumed.progress.step == 2
    resumed.run()
    for (name, left), right in zip(straight.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(left, right), name


def test_sigterm_in_the_last_step_is_a_finished_run(tmp_path: Path) -> None:
    assert make_trainer(tmp_path, 3).run().step == 4


def test_a_helper_process_does_not_end_by_sigterm(tmp_path: Path) -> None:
    """Batch 1 is the helper's. A signal to all processes of a run would else lose the step."""
    assert make_trainer(tmp_path, 1, replicas=2).run(stop_after=1).step == 1


def test_a_second_ctrl_c_ends_at_once() -> None:
    with StopOnSignal() as stop, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("a second one is not noted")


def test_later_signals_leave_a_rank_to_its_saving(capsys: pytest.CaptureFixture[str]) -> None:
    with StopOnSignal(ends_at_second=False) as stop:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
            assert stop.requested and stop.reason == "Ctrl-C"
    assert capsys.readouterr().err == "\nCtrl-C: ending after the step in progress\n"


def test_a_rank_that_ends_by_an_error_says_it_before_the_launcher_ends_it() -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(RuntimeError), StopOnSignal(ends_at_second=False):
            raise RuntimeError("another rank ended")
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_second_sigterm_ends_the_process() -> None:
    with StopOnSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
