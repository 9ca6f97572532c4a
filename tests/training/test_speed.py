"""Live line and metrics: speed, share of the machine's products, memory; TensorBoard's files."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from rich.console import Console

from dsv4 import notices
from dsv4.analysis.training_flops import training_flops
from dsv4.training import tensorboard
from dsv4.training.loop import Stage, Trainer, TrainSettings
from dsv4.training.plan import FixedPlan
from dsv4.training.schedule import Schedule
from dsv4.training.speed import SpeedMeter, peak_memory, product_rate

from .tiny_training import CONFIG, Rows, draw_documents, make_model

CPU = torch.device("cpu")


class Documents:
    def batch(self, step: int, /) -> Rows:
        return Rows(draw_documents(step, 30, 9))


def train(folder: Path, steps: int = 1, **options: Any) -> list[dict[str, Any]]:
    model, optimizer = make_model()
    settings = TrainSettings(Schedule(peak=0.02, warmup_steps=1))
    Trainer(
        model, optimizer, [Stage("only", 1.0, Documents())], settings, FixedPlan(steps), folder,
        speed=SpeedMeter(CONFIG, CPU, lambda: 1e12), **options,
    ).run()  # fmt: skip
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_line_and_the_metrics_have_speed_mfu_memory_and_time_left(tmp_path: Path) -> None:
    out = io.StringIO()
    (row,) = train(tmp_path, console=Console(file=out, width=200))
    seconds = row["tokens"] / row["tokens_per_second"]
    assert row["flops_per_second"] == pytest.approx(training_flops(CONFIG, (30, 9)) / seconds, rel=1e-3)
    assert row["mfu"] == pytest.approx(row["flops_per_second"] / 1e12, abs=1e-4)
    assert row["peak_memory_bytes"] > 50e6
    for part in (" tok/s  ", "MFU ", " GB  left 0:00"):
        assert part in out.getvalue()


def test_the_product_rate_is_of_this_machine() -> None:
    one, two = product_rate(CPU), product_rate(CPU, processes=2)
    assert 1e8 < one < 1e14
    assert 0.2 < two / (2 * one) < 5
    assert peak_memory(CPU) > 50e6


def test_a_rate_that_was_measured_too_low_is_measured_again() -> None:
    """Under load at first; later measurements that are no better change nothing."""
    rates = iter((1e9, 4e9, 2e9))
    meter = SpeedMeter(CONFIG, CPU, lambda: next(rates))
    flops = training_flops(CONFIG, (30, 9), "sparse", False)
    assert meter.measure((30, 9), "sparse", False, flops / 5e8)["mfu"] == 0.5
    assert meter.measure((30, 9), "sparse", False, flops / 2e9)["mfu"] == 0.5
    assert meter.measure((30, 9), "sparse", False, flops / 6e9)["mfu"] > 1 and meter.rate == 4e9


class FakeWriter:
    made: ClassVar[list[FakeWriter]] = []

    def __init__(self, folder: str, purge_step: int) -> None:
        self.folder, self.purge_step, self.closed = folder, purge_step, False
        self.scalars: list[tuple[str, float, int]] = []
        self.made.append(self)

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars.append((tag, value, step))

    def close(self) -> None:
        self.closed = True


def test_tensorboard_gets_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", SimpleNamespace(SummaryWriter=FakeWriter))
    monkeypatch.setattr(FakeWriter, "made", [])
    rows = train(tmp_path, steps=2, quiet=True, tensorboard=True)
    (writer,) = FakeWriter.made
    assert (writer.folder, writer.purge_step, writer.closed) == (str(tmp_path / "tensorboard"), 0, True)
    assert [(v, s) for tag, v, s in writer.scalars if tag == "loss/loss"] == [(r["loss"], r["step"]) for r in rows]
    assert {"training/lr", "speed/mfu", "speed/tokens_per_second"} <= {tag for tag, _, _ in writer.scalars}


def test_real_event_files_if_the_library_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    train(tmp_path, quiet=True, tensorboard=True)
    assert list((tmp_path / "tensorboard").glob("events.out.*"))


def test_a_missing_library_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tensorboard, "WRITERS", ("no_such_writer",))
    monkeypatch.setattr(notices, "_told", set())
    for _ in range(2):
        assert tensorboard.open_writer(tmp_path, 0) is None
    assert [record.getMessage() for record in caplog.records] == [
        "no TensorBoard files are written: none of no_such_writer is installed (pip install tensorboardX)"
    ]
