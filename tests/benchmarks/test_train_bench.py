"""`dsv4 bench train`: it runs, its contenders compute one loss, its floors add up, and its run is reported."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks/ belongs to the checkout, not to the installed package

from benchmarks import report, train
from benchmarks.harness import train_rounds, trainers
from benchmarks.harness.machine import measure_ceilings
from benchmarks.harness.random_checkpoint import write_random_values
from benchmarks.harness.results import append, read
from benchmarks.harness.scenarios import SLICE, TINY
from benchmarks.harness.training_parts import floors, muon_operations, operations
from dsv4.analysis.training_flops import training_flops
from dsv4.kernels import backends


def test_contenders_take_turns_and_the_run_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    contenders = ("dsv4 bf16", "transformers")
    options = ["--quick", "--no-gate", "--threads", "1", "--busy", "--results", str(tmp_path)]
    assert train.main([*options, "--recompute", "blocks", "--contenders", *contenders]) == 0
    printed = capsys.readouterr().out
    assert "tokens per processor second" in printed and "UNGATED" in printed
    (file,) = tmp_path.glob("*.jsonl")
    (run,) = read(file)
    assert run.settings["recompute"] == "blocks"
    for measure, tokens in ((train_rounds.GRADIENT, 32), (train_rounds.STEP, 48)):
        for name in contenders:
            row, peak = (run.find(name, what, tokens) for what in (measure, f"{train_rounds.PEAK}, {measure}"))
            assert row is not None and row.median > 0 and row.floor > 0
            assert peak is not None and peak.median > peak.floor > 0
    if backends.native_module() is not None:
        parts = {row.measure.split(": ")[1] for row in run.rows if row.measure.startswith(train_rounds.PART)}
        assert {"projections", "experts", "attention", "mHC and norms", "head", "optimizer", "other"} <= parts
    run.gated, run.quick = True, False
    file.unlink()
    append(tmp_path / "this.jsonl", run)
    page = report.document(tmp_path)
    assert "`dsv4 bench train --busy --recompute blocks`" in page
    assert "### train slice" in page and "| forward and backward, 2 x 16 " in page and "optimizer" in page


def test_contenders_compute_the_same_next_token_loss(tmp_path: Path) -> None:
    write_random_values(TINY, tmp_path / "model", 1, "fp32")
    losses = []
    for name in trainers.CONTENDERS:
        trainers.load(name, tmp_path / "model")
        losses.append(trainers.run(name, (2, 24), 2, True, 3).loss)
    assert losses[1:] == pytest.approx(losses[:1] * 3, rel=2e-2)
    assert losses[3] == pytest.approx(losses[0], rel=1e-3)
    trainers.load("dsv4", tmp_path / "model", "blocks")
    assert trainers.run("dsv4", (2, 24), 2, True, 3).loss == losses[0]
    assert len(trainers.matrices(tmp_path / "model")) > 100


@pytest.mark.parametrize("config", [TINY, SLICE])
def test_operations_of_the_parts_are_those_of_training(config: object) -> None:
    assert config in (TINY, SLICE)
    lengths = (130, 700)
    parts = operations(config, lengths)  # pyright: ignore
    assert sum(flops for flops, _ in parts.values()) == pytest.approx(training_flops(config, lengths, mtp=False))  # pyright: ignore
    ceilings = {"fp32_flop_per_s": 1e9, "bf16_flop_per_s": 2e9}
    ceilings |= {"fp32_flop_per_processor_s": 4e8, "bf16_flop_per_processor_s": 5e8}
    plain, rounded = floors(parts, ceilings, False), floors(parts, ceilings, True)
    assert rounded["experts"] == plain["experts"] / 2 and rounded["attention"] == plain["attention"]
    muon = {"optimizer": (4e9, 1.0)}
    assert floors(muon, ceilings, False) == floors(muon, ceilings, True) == {"optimizer": 2.0}
    assert plain["projections"] / 2 < rounded["projections"] < plain["projections"]
    alone = floors(parts, ceilings, True, "processor_")
    assert alone["experts"] == pytest.approx(parts["experts"][0] / 5e8)
    assert alone["attention"] == pytest.approx(parts["attention"][0] / 4e8)
    forward = floors(operations(config, lengths, False), ceilings, True)  # pyright: ignore
    assert forward["head"] == plain["head"] and rounded["experts"] < forward["experts"] < plain["experts"]
    assert muon_operations([(2, 3), (3, 2)]) == 2 * 10 * (2 * 2 * 3 + 2 * 2 * 2 + 2 * 2 * 2 * 3)


def test_floors_are_of_the_best_rates_of_the_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine was busy as the run began, and is again as it ends; alone, a thread does more per second."""
    rates = iter((1.0, 4.0, 2.0))

    class Here:
        def __init__(self, name: str, threads: int) -> None:
            self.threads = threads

        def __enter__(self) -> Here:
            return self

        def __exit__(self, *error: object) -> None: ...

        def call(self, function: object, *arguments: object) -> object:
            if function is not train_rounds.measure_ceilings:
                return {trainers.matrices: [(2, 3)], trainers.bf16_gradients: True}.get(function)  # pyright: ignore
            if self.threads == 1:
                return {"fp32_flop_per_s": 3e9, "bf16_flop_per_s": 5e9}
            rate = next(rates)
            return {"fp32_flop_per_s": rate * 1e9, "bf16_flop_per_s": (8 - rate) * 1e9}

    def took(rounds: object, folder: Path, what: str, shape: tuple[int, int], micro_batches: int) -> object:
        one = trainers.Took(1.0, 2.0, 0.0, 1, {"experts": 0.5})
        return train_rounds._Measured(what, shape, micro_batches, {"dsv4": [10.0]}, {"dsv4": 1.0}, {"dsv4": one})

    monkeypatch.setattr(train_rounds, "Process", Here)
    monkeypatch.setattr(train_rounds.TrainRounds, "_shape", took)
    rounds = train_rounds.TrainRounds(TINY, ("dsv4",), ((2, 16),), ((1, 24), 2), 1, 2, False, tmp_path)
    run = rounds.measure(lambda text: None)
    assert run.ceilings == {
        "fp32_flop_per_s": 4e9, "bf16_flop_per_s": 7e9, "fp32_flop_per_processor_s": 3e9,
        "bf16_flop_per_processor_s": 5e9,
    }  # fmt: skip
    work = operations(TINY, [16, 16])
    (row,) = [row for row in run.rows if row.measure == f"{train_rounds.PART}, {train_rounds.GRADIENT}: experts"]
    assert row.floor == pytest.approx(work["experts"][0] / 3e9)
    whole = run.find("dsv4", train_rounds.GRADIENT, 32)
    assert whole is not None and whole.floor == pytest.approx(32 * 4e9 / sum(flops for flops, _ in work.values()))


def test_the_fp32_rate_is_that_of_the_faster_product(monkeypatch: pytest.MonkeyPatch) -> None:
    product = torch.mm

    def slow(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        time.sleep(0.05)
        return product(a, b)

    monkeypatch.setattr(torch, "mm", slow)
    found = measure_ceilings(1, 128)
    assert found["bf16_flop_per_s"] < 2 * 128**3 / 0.05 < found["fp32_flop_per_s"]


def test_nano_reads_the_rates_of_a_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []

    def ran(command: list[str], **named: object) -> object:
        seen.append((command, named["cwd"]))
        folder = Path(command[command.index("--run-dir") + 1])
        folder.mkdir(parents=True)
        rates = (1.0, 300.0, 500.0, 400.0)
        (folder / "metrics.jsonl").write_text("".join(f'{{"tokens_per_second": {rate}}}\n' for rate in rates))
        return type("Done", (), {"returncode": 0, "stderr": ""})

    monkeypatch.setattr(train_rounds.subprocess, "run", ran)
    with pytest.raises(train_rounds.BenchmarkError, match=f"make -C {tmp_path} .venv/.test"):
        train_rounds.NanoRounds(tmp_path, 4, 2, []).measure(lambda text: None)
    seen.clear()
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    run = train_rounds.NanoRounds(tmp_path, 4, 2, ["--precision", "bf16"]).measure(lambda text: None)
    assert [row.samples for row in run.rows] == [[400.0, 400.0]] * 2
    assert {cwd for _, cwd in seen} == {train_rounds.ROOT, tmp_path} and len(seen) == 4
    assert [command[-2:] == ["--precision", "bf16"] for command, cwd in seen] == [cwd != tmp_path for _, cwd in seen]
    assert {(command[0], cwd) for command, cwd in seen} == {
        (sys.executable, train_rounds.ROOT), (str(python), tmp_path)
    }  # fmt: skip


@pytest.mark.parametrize("wrong", ["0x4", "4", "4x"])
def test_wrong_shapes_are_refused(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main(["--shapes", wrong])
    assert "1 or more" in capsys.readouterr().err


def test_gradients_are_gone_after_an_update(tmp_path: Path) -> None:
    write_random_values(TINY, tmp_path / "model", 1, "fp32")
    trainers.load("dsv4 bf16", tmp_path / "model")
    trainers.run("dsv4 bf16", (1, 16), 1, True, 0)
    model = trainers._contenders["dsv4 bf16"].model  # pyright: ignore
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.isfinite(model.head.weight).all()
