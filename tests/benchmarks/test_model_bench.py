"""`dsv4 bench model`: it runs, keeps the contenders apart, and reports nothing where models or tests disagree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("psutil")

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks/ belongs to the checkout, not to the installed package

from benchmarks import model as bench  # noqa: E402
from benchmarks.comparison import floors, gate, plan, process, report, rows  # noqa: E402
from benchmarks.comparison.rows import Row  # noqa: E402


def command(results: Path, *more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_CBWR": "AVX2,STRICT"}
    arguments = ["bench", "model", "--quick", "--threads", "1", "--results", str(results), *more]
    return subprocess.run(
        [sys.executable, "-m", "dsv4", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_quick_run(tmp_path: Path) -> None:
    """One run, looked at from all sides: it takes some seconds."""
    done = command(tmp_path, "--no-gate")
    assert done.returncode == 0, done.stderr
    assert "UNGATED" in done.stdout and "not attempted" in done.stdout and "decode, 20 tokens" in done.stdout
    (file,) = tmp_path.glob("*.jsonl")
    lines: list[dict[str, Any]] = [json.loads(line) for line in file.read_text().splitlines()]
    check_measures(lines)
    check_provenance(lines)
    if find_spec("matplotlib"):
        assert (tmp_path / "prefill.png").stat().st_size > 5000


def check_measures(lines: list[dict[str, Any]]) -> None:
    """Both contenders have every shared measure; the long prompt is dsv4's alone."""
    found = {(row["peer"], row["measure"], row["tokens"]): row for row in lines}
    q = plan.QUICK
    prefills = {("prefill", length) for length in (*q.prefill, q.fresh_length)}
    shared = {("decode", q.prompt), ("peak memory", q.fresh_length), *prefills}
    alone = {("dsv4", what, q.long_length) for what in ("prefill", "peak memory")}
    small = {("transformers", "peak memory", q.fresh_small)}
    assert set(found) == {(peer, *key) for peer in plan.PEERS for key in shared} | alone | small
    for row in found.values():
        assert row["median"] > 0 and row["rounds"] == 1 and row["over_floor"] > 1, row


def check_provenance(lines: list[dict[str, Any]]) -> None:
    for row in lines:
        assert row["gated"] is False and row["plan"] == "quick" and row["threads"] == 1
        assert row["parameters"] > 100_000 and row["shape"]["hidden_size"] == plan.TINY.hidden_size
        assert len(row["commit"].removesuffix("+changes")) == 40 or row["commit"] == "unknown"
        assert row["hardware"]["cores"] >= 1 and row["ceilings"]["fp32_flop_per_s"] > 1e8
        assert 0 < row["logits_deviation"] < gate.TOLERANCE
        settings = row["settings"]
        assert settings["dsv4"]["mkl_cbwr"] == "AVX2,STRICT", "the user's choice is respected"
        assert settings["transformers"]["mkl_cbwr"] is None, "dsv4's MKL mode slows transformers down"
        assert all(settings[peer]["threads"] == 1 for peer in plan.PEERS)


def test_stages_are_counted() -> None:
    """The progress bar ends where the comparison does; workers are stood in for."""
    calls: list[str] = []
    comparison = bench.Comparison(plan.QUICK, 1, Path("."), calls.append)
    answer = {"seconds": 1.0, "peak_bytes": 1, "settings": {}}

    class Stub:
        def __init__(self, peer: str, threads: int) -> None:
            self.peer = peer

        def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
            return {"read_bytes_per_s": 1.0} if do == "ceilings" else answer

        def __enter__(self) -> Stub:
            return self

        def __exit__(self, *error: object) -> None:
            pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "WorkerProcess", Stub)
        patch.setattr(bench, "check_logits", lambda *args: 0.0)
        comparison.measure()
    assert len(calls) == bench.num_stages(plan.QUICK)


@pytest.mark.parametrize("wrong", [1.001, float("nan")])
def test_no_numbers_when_the_logits_disagree(wrong: float) -> None:
    right = np.random.default_rng(0).normal(size=(3, 40))
    assert gate.deviation(right * (1 + 1e-6), right) < 1e-5
    other = right.copy()
    other[1, 7] *= wrong
    other[0, np.abs(right[0]).argmax()] *= wrong
    with pytest.raises(process.BenchmarkError, match="logits disagree"):
        gate.deviation(other, right)


def test_no_numbers_on_red_or_missing_tests(tmp_path: Path) -> None:
    (tmp_path / "test_green.py").write_text("def test_one(): pass\n")
    (tmp_path / "test_red.py").write_text("def test_two(): assert 1 == 2\n")
    gate.run_tests(("test_green.py",), tmp_path)
    with pytest.raises(process.BenchmarkError, match="1 == 2"):
        gate.run_tests(("test_green.py", "test_red.py"), tmp_path)
    with pytest.raises(process.BenchmarkError, match="test_gone.py"):
        gate.run_tests(("test_green.py", "test_gone.py"), tmp_path)


def test_a_red_gate_writes_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def red() -> None:
        raise process.BenchmarkError("the frozen tests are red")

    monkeypatch.setattr(bench, "run_tests", red)
    assert bench.main(["--quick", "--results", str(tmp_path)]) == 1
    assert "red" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_package_that_changes_during_the_run_gives_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    package = tmp_path / "package"
    package.mkdir()
    source = package / "module.py"
    source.write_text("VALUE = 1\n")
    monkeypatch.setattr(bench, "package_digest", lambda: rows.package_digest(package))
    monkeypatch.setattr(bench.Comparison, "measure", lambda self: source.write_text("VALUE = 2\n"))
    assert bench.main(["--quick", "--no-gate", "--results", str(tmp_path / "results")]) == 1
    assert "changed during the run" in capsys.readouterr().err and not (tmp_path / "results").exists()


def test_a_contender_that_dies_is_named(tmp_path: Path) -> None:
    with (
        process.WorkerProcess("transformers", 1) as worker,
        pytest.raises(process.BenchmarkError, match="transformers ended with status 1 during 'load'"),
    ):
        worker.ask("load", folder=str(tmp_path / "nothing"))


def test_ratio_and_targets() -> None:
    def row(peer: str, measure: str, tokens: int, samples: list[float]) -> Row:
        return Row(peer, measure, tokens, "bytes" if "memory" in measure else "tok/s", samples, 1.0)

    found = report.index(
        [
            row("dsv4", "decode", 128, [90.0, 100.0, 120.0]),
            row("transformers", "decode", 128, [26.0, 25.0, 24.0]),
            row("dsv4", "peak memory", 8192, [2e9]),
            row("transformers", "peak memory", 8192, [7.9e9]),
            row("dsv4", "peak memory", 65536, [3.9e9]),
        ]
    )
    verdicts = {(target.measure, target.tokens): report.verdict(found, target) for target in plan.TARGETS}
    assert verdicts == {
        ("decode", 128): (4.0, True),
        ("prefill", 8192): None,
        ("peak memory", 8192): (2e9 / 7.9e9, False),
        ("peak memory", 65536): (3.9e9, True),
    }
    assert [made.extra["met"] for made in bench.target_rows(found)] == [True, False, True]
    assert found["dsv4", "decode", 128].spread == pytest.approx(0.3)


def test_floors_of_the_measured_shape() -> None:
    """28.66M weights a token, read at 10 GB/s; a prompt costs 2 operations a weight and token, more as it grows."""
    ceilings = {"read_bytes_per_s": 1e10, "fp32_flop_per_s": 1e11}
    assert floors.decode_floor(plan.SHAPE, ceilings) == pytest.approx(28_661_173 * 4 / 1e10)
    assert floors.memory_floor(plan.SHAPE) == 120_935_861 * 4
    without_head = 28_661_173 - 8192 * 512
    short, long = (floors.prefill_flops(plan.SHAPE, n) / n for n in (512, 8192))
    assert 2 * without_head < short < long < 4 * without_head
    every = sum(floors.decode_flops(plan.SHAPE, t + 1).raw for t in range(512)) - 511 * 2 * 8192 * 512
    assert floors.prefill_flops(plan.SHAPE, 512) == pytest.approx(every, rel=0.01)


def test_growth() -> None:
    growth = floors.extrapolate((2, 14.0), (4, 50.0), 10)  # 2 + 3 x^2
    assert growth.parabola == pytest.approx(302) and growth.line == pytest.approx(158)


def test_hardware_names_a_file() -> None:
    assert (
        rows.hardware_slug({"cpu": "Intel(R) Xeon(R) Processor @ 2.60GHz", "cores": 2})
        == "intel-xeon-processor-2-cores"
    )
    assert rows.hardware()["memory_bytes"] > 1e9
