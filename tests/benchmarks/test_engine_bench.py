"""`dsv4 bench engine`: runs with a stand-in for llama-bench, reads its answers, knows its aims, refuses other paths."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("psutil")

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks/ belongs to the checkout, not to the installed package

from benchmarks import engine as bench  # noqa: E402
from benchmarks.comparison import floors  # noqa: E402
from benchmarks.comparison.process import BenchmarkError  # noqa: E402
from benchmarks.comparison.rows import Row  # noqa: E402
from benchmarks.engines import aims, llama_bench, million, plan, plot, table, versus, wide  # noqa: E402
from benchmarks.engines.contenders import LlamaContender  # noqa: E402
from benchmarks.engines.llama_bench import LlamaBench, Taken  # noqa: E402
from benchmarks.engines.outcome import Outcome  # noqa: E402
from dsv4.config import ModelConfig, nano_path  # noqa: E402

CEILINGS = {"copy_bytes_per_s": 3e10, "read_bytes_per_s": 4e10, "fp32_flop_per_s": 1e11, "bf16_flop_per_s": 3e11}
FAKE = """#!{python}
import json, sys
options = dict(zip(sys.argv[1:], sys.argv[2:]))
if "--help" in sys.argv:
    print("--n-prompt --n-depth --flash-attn")
    raise SystemExit
assert options["-r"] == "1" and options["-o"] == "json" and options["-t"] == "1"
prompt, steps, depth = (int(options.get(name, 0)) for name in ("-p", "-n", "-d"))
if prompt == {fails_at}:
    raise SystemExit("out of cells")
with open(options["-m"], "rb") as file:
    assert file.read(4) == b"GGUF"
rate = 100.0 + ("q8_0" in options["-m"]) + 2 * ("-fa" in options)
print(json.dumps([{{"n_prompt": prompt, "n_gen": steps, "n_depth": depth, "avg_ts": rate, "build_commit": "fake"}}]))
"""


def fake(tmp_path: Path, fails_at: int = -1) -> Path:
    path = tmp_path / "llama-bench"
    path.write_text(FAKE.format(python=sys.executable, fails_at=fails_at))
    path.chmod(0o755)
    return path


def command(results: Path, *more: str) -> subprocess.CompletedProcess[str]:
    arguments = ["bench", "engine", "--quick", "--no-gate", "--threads", "1", "--results", str(results), *more]
    return subprocess.run(
        [sys.executable, "-m", "dsv4", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def read_rows(results: Path) -> list[dict[str, Any]]:
    (file,) = results.glob("*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.skipif(find_spec("gguf") is None, reason="llama.cpp's files need the package gguf")
def test_quick_run_of_every_model(tmp_path: Path) -> None:
    """One run, looked at from all sides: it takes some seconds."""
    llama, results = fake(tmp_path, fails_at=130), tmp_path / "results"
    done = command(results, "--models", ",".join(plan.MODELS), "--llama-bench", str(llama), "--rounds", "1")
    assert done.returncode == 0, done.stderr
    assert "UNGATED" in done.stdout and "out of cells" in done.stdout and "q8_0 fa" in done.stdout
    rows = read_rows(results)
    q = plan.QUICK
    for model in plan.COMPARED:
        found = {(row["peer"], row["measure"], row["tokens"]): row for row in rows if row["model"] == model}
        for key in [("prefill", n) for n in q.prefill] + [("decode", n) for n in q.depths]:
            assert found["dsv4", *key]["median"] > 0
            lent = key[1] != 130 if key[0] == "prefill" else key[1] <= q.llama_depth
            assert (("llama.cpp q8_0 fa", *key) in found) == lent
        assert [len(found["dsv4", plan.IN_TURNS, n]["samples"]) for n in q.depths] == [q.turns] * len(q.depths)
        assert found["llama.cpp q8_0 fa", "decode", 0]["median"] == 103.0
        assert ("transformers", "prefill", 64) in found and ("transformers", "prefill", 130) not in found
        assert 0 < found["dsv4", "decode", 0]["logits_deviation"] < 1e-4
        assert len(found["dsv4", "decode", 0]["failures"]) == 4
        assert found["dsv4", "decode", 0]["settings"]["llama.cpp"]["build_commit"] == "fake"
    check_alone(rows)
    (aim,) = (row for row in rows if row["peer"] == "aim" and row["model"] == "slice")
    assert (aim["measure"], aim["tokens"], aim["floor"]) == ("decode", 0, 2.0) and aim["extra"]["met"] in (True, False)
    assert all(row["benchmark"] == "engine" and row["plan"] == "quick" and row["gated"] is False for row in rows)
    if find_spec("matplotlib"):
        assert (results / "context.png").stat().st_size > 5000


def check_alone(rows: list[dict[str, Any]]) -> None:
    """flash-width and million: dsv4 against the machine, and at every doubling."""
    wide_rows = {row["measure"]: row for row in rows if (row["model"], row["peer"]) == ("flash-width", "dsv4")}
    read, decode = wide_rows["weights read, of a copy's bytes"], wide_rows["decode"]
    assert read["median"] == pytest.approx(decode["median"] * floors.token_bytes(plan.QUICK.wide))
    assert read["floor"] == read["ceilings"]["copy_bytes_per_s"]
    long = [row for row in rows if row["model"] == "million"]
    assert {row["tokens"] for row in long} == {128, 256, 512, 1024}
    (last,) = (row for row in long if row["measure"] == "peak memory" and row["tokens"] == 1024)
    assert last["extra"]["cache_num_bytes"]["entries"] > 0 and last["median"] > last["floor"]


def measured(model: str) -> Outcome:
    return Outcome(
        model, plan.TINY, [row("dsv4", "decode", 0, 5.0), row("transformers", "decode", 0, 2.0)], CEILINGS, {}
    )


def test_models_in_turn_without_llama(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each model gets the chosen rounds and the kept folder; its rows are there although a later one fails."""
    asked: list[tuple[Any, ...]] = []

    def measure(model: str, chosen: plan.Plan, threads: int, scratch: Path, llama: object, console: object) -> Outcome:
        asked.append((model, chosen.rounds, threads, scratch, llama))
        if model == "nano":
            raise BenchmarkError("dsv4 was killed by SIGKILL")
        return measured(model)

    monkeypatch.setattr(bench, "measure", measure)
    results, scratch = tmp_path / "results", tmp_path / "kept"
    arguments = ["--without-llama", "--no-gate", "--rounds", "5", "--scratch", str(scratch), "--results", str(results)]
    assert bench.main(arguments) == 1
    assert asked == [(model, 5, 2, scratch, None) for model in ("slice", "nano")] and scratch.is_dir()
    printed = capsys.readouterr()
    assert "2.50 x" in printed.out and "killed by SIGKILL" in printed.err
    assert {(row["model"], row["peer"]) for row in read_rows(results)} == {("slice", "dsv4"), ("slice", "transformers")}


def test_a_package_that_changes_during_the_run_gives_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    digests = iter("ab")
    monkeypatch.setattr("benchmarks.comparison.rows.package_digest", lambda: next(digests))
    monkeypatch.setattr(bench, "measure", lambda model, *rest: measured(model))
    results = tmp_path / "results"
    assert bench.main(["--models", "million", "--no-gate", "--results", str(results)]) == 1
    assert "changed during the run" in capsys.readouterr().err and not results.exists()


def test_a_wrong_path_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, other = tmp_path / "text", tmp_path / "other"
    text.write_text("no program")
    other.write_text("#!/bin/sh\necho usage: other\n")
    other.chmod(0o755)
    wrong = {tmp_path / "gone": "no such file", text: "no executable file", other: "not llama.cpp's llama-bench"}
    for path, message in wrong.items():
        assert bench.main(["--quick", "--llama-bench", str(path), "--results", str(tmp_path / "results")]) == 1
        error = capsys.readouterr().err
        assert message in error and str(path) in error and "make llama-bench" in error
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --llama-bench PATH"),
        (["--models", "slice,wide"], "'wide' is unknown; allowed: slice, nano, flash-width, million"),
        (["--rounds", "0"], "at least 1"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert message in capsys.readouterr().err


def test_a_red_gate_writes_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def red() -> None:
        raise BenchmarkError("the frozen tests are red")

    monkeypatch.setattr("benchmarks.comparison.gate.run_tests", red)
    assert bench.main(["--quick", "--without-llama", "--results", str(tmp_path)]) == 1
    assert "red" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_llama_bench_runs_and_fails(tmp_path: Path) -> None:
    llama = LlamaBench(fake(tmp_path, fails_at=77), 1)
    gguf = tmp_path / "q8_0.gguf"
    gguf.write_bytes(b"GGUF")
    assert llama.run(gguf, steps=4, depth=16, flash=True).rate == 103.0 and llama.build["build_commit"] == "fake"
    with pytest.raises(BenchmarkError, match="status 1.*-p 77(.|\n)*out of cells"):
        llama.run(gguf, prompt=77)


def test_llama_bench_that_aborts_on_repacked_weights_gets_them_plain(tmp_path: Path) -> None:
    gguf = tmp_path / "q8_0.gguf"
    gguf.write_bytes(b"GGUF")
    assert not LlamaBench(fake(tmp_path), 1).needs_plain_weights(gguf)
    path = fake(tmp_path)
    path.write_text(
        path.read_text().replace(
            "import", 'import sys\nif len(sys.argv) > 2 and "--repack" not in sys.argv:\n    sys.exit(6)\nimport', 1
        )
    )
    llama = LlamaBench(path, 1)
    assert llama.needs_plain_weights(gguf)
    contender = LlamaContender(llama, gguf, "q8_0", True, False, plan.QUICK)
    assert contender.name == "llama.cpp q8_0 repack 0 fa" and contender.take("prefill", 64, 0).rate > 0


@pytest.mark.parametrize("answer", ["", "[]", "{}", '[{"n_prompt": 8, "n_gen": 0, "n_depth": 0, "avg_ts": 0}]', "[1]"])
def test_what_is_no_figure_is_refused(answer: str) -> None:
    with pytest.raises(BenchmarkError, match="not one figure of 8"):
        llama_bench.parse(answer, 8, 0, 0)


class Stub:
    """A contender that keeps count."""

    def __init__(self, name: str, group: str, rate: float, wall_s: float = 1.0) -> None:
        self.name, self.group, self.rate, self.wall_s, self.asked = name, group, rate, wall_s, 0

    def can(self, measure: str, tokens: int) -> bool:
        return True

    def take(self, measure: str, tokens: int, turn: int) -> Taken:
        self.asked += 1
        return Taken(self.rate, self.wall_s, 100 + tokens)


def test_rounds_drop_the_slower_setting_and_what_takes_too_long() -> None:
    slow, fast = Stub("llama.cpp bf16", "llama.cpp bf16", 1.0), Stub("llama.cpp bf16 fa", "llama.cpp bf16", 2.0)
    long, ours = Stub("transformers", "transformers", 1.0, wall_s=60.0), Stub("dsv4", "dsv4", 3.0)
    rounds, stages = versus.Rounds([ours, slow, fast, long], budget_s=100.0), []
    for number in range(4):
        rounds.turn(number, [("prefill", 64)], stages.append)
    assert [stub.asked for stub in (ours, slow, fast, long)] == [4, 1, 4, 2] and len(stages) == 16


def test_a_long_lived_process_has_peaks_of_growing_lengths_only() -> None:
    rounds = versus.Rounds([Stub("dsv4", "dsv4", 1.0)], budget_s=100.0)
    rounds.turn(0, [("prefill", 64), ("prefill", 512), ("decode", 128), ("decode", 1024)], lambda what: None)
    rounds.turn(1, [("prefill", 64)], lambda what: None)
    assert set(rounds.peaks) == {("dsv4", 64), ("dsv4", 512), ("dsv4", 1024)}


def row(peer: str, measure: str, tokens: int, median: float, floor: float = 1.0) -> Row:
    return Row(peer, measure, tokens, "bytes" if "memory" in measure else "tok/s", [median], floor)


def test_aims() -> None:
    """The faster of llama.cpp's rows is the peer; its own depth, the machine and bytes above a formula are others."""
    rows = [
        row("dsv4", "decode", 0, 440.0),
        row("llama.cpp bf16", "decode", 0, 200.0),
        row("llama.cpp q8_0 fa", "decode", 0, 222.0),
        row("dsv4", plan.IN_TURNS, 1024, 400.0),
        row("dsv4", plan.IN_TURNS, 131072, 240.0),
        row("dsv4", "prefill", 2048, 4000.0),
        row("llama.cpp q8_0", "prefill", 2048, 916.0),
        row("dsv4", "prefill", 8192, 4000.0),
        row("transformers", "prefill", 8192, 60.0),
    ]
    found = {(row.measure, row.tokens): (row.median, row.extra["met"]) for row in aims.aim_rows(rows, "slice")}
    assert found == {
        ("decode", 0): (440 / 222, False),
        (plan.IN_TURNS, 131072): (0.6, True),
        ("prefill", 2048): (4000 / 916, True),
    }
    (memory,) = aims.aim_rows([row("dsv4", "peak memory", 2**20, 1.9e9, floor=5e8)], "million")
    assert memory.median == 1.4e9 and memory.extra["met"]
    wide_rows = wide.make_rows(plan.FULL, "dsv4", {"decode": [50.0], "prefill": [100.0]}, CEILINGS)
    shares = {row.measure: (round(row.median, 2), row.extra["met"]) for row in aims.aim_rows(wide_rows, "flash-width")}
    weights, work = floors.token_bytes(plan.FLASH_WIDTH), floors.prefill_flops(plan.FLASH_WIDTH, 1024) / 1024
    assert shares == {
        "weights read, of a copy's bytes": (round(50 * weights / 3e10, 2), True),
        "operations, of the faster torch.mm": (round(100 * work / 3e11, 2), False),
    }


def test_every_aim_is_measured_by_the_full_plan() -> None:
    full = plan.FULL
    measured = {("prefill", n) for n in full.prefill} | {
        (what, n) for what in ("decode", plan.IN_TURNS) for n in full.depths
    }
    for aim in aims.AIMS:
        if aim.model == "slice":
            assert (aim.measure, aim.tokens) in measured
            assert aim.against != "llama.cpp" or aim.measure == "prefill" or aim.tokens <= full.llama_depth
        else:
            assert aim.tokens == (full.wide_prompt if aim.model == "flash-width" else full.marks()[-1])
    assert full.marks()[0] == 1024 and full.marks()[-1] == 1048576


def test_bytes_of_a_token() -> None:
    """Two Flash layers: all but 250 of 256 experts, half a byte and a 32nd a weight; the embedding is a look-up."""
    config = plan.FLASH_WIDTH
    expert = 3 * 4096 * 2048 * (1 / 2 + 1 / 32)
    least = 2 * 6 * expert + 2 * 3 * 4096 * 2048
    assert least < floors.token_bytes(config) < 2.5 * least
    assert floors.stored_bytes(config) - floors.token_bytes(config) == 2 * 250 * expert + 1024 * 4096 * 2


def test_kv_formula_of_the_caches_formats() -> None:
    config = ModelConfig.from_pretrained(nano_path())
    fp32, bf16, fp8 = (million.kv_bytes(config, 2**20, size) for size in (4, 2, 1))
    assert fp32 > 1.9 * bf16 > 1.9 * fp8 > 0
    model_bytes = 2 * 2**18 * (64 + 32) * 4 + 2 * 2**13 * 64 * 4  # entries and index keys of two CSA and two HCA layers
    assert fp32 == pytest.approx(model_bytes, rel=0.01)


def test_time_left_bends_with_the_position() -> None:
    clock = million.Clock()
    for position in range(0, 1000, 100):
        clock.add(position, 100, 100 * (1 + (position + 50) / 1000))
    assert clock.left(1000, 2000) == pytest.approx(1000 * 2.5)


def test_plot_takes_the_newest_rows_and_the_best_of_llama(tmp_path: Path) -> None:
    def line(model: str, peer: str, measure: str, median: float, **more: Any) -> str:
        common = {"benchmark": "engine", "plan": "full", "tokens": 2048, "floor": 5.0}
        return json.dumps({**common, "model": model, "peer": peer, "measure": measure, "median": median, **more})

    file = tmp_path / "rows.jsonl"
    texts = [
        line("slice", "dsv4", "prefill", 1.0),
        line("slice", "dsv4", "prefill", 2.0),
        line("slice", "llama.cpp bf16", "prefill", 3.0),
        line("slice", "llama.cpp q8_0 fa", "prefill", 4.0),
        line("nano", "dsv4", "peak memory", 6.0),
        line("million", "dsv4", "peak memory", 7.0),
        line("slice", "dsv4", "prefill", 8.0, plan="quick"),
        json.dumps({"benchmark": "model", "peer": "dsv4"}),
    ]
    file.write_text("\n".join(texts) + "\n")
    found, formula = plot.lines(file, "full")
    assert found == {
        ("slice", "dsv4", "prefill"): {2048: 2.0},
        ("slice", "llama.cpp", "prefill"): {2048: 4.0},
        ("nano", "dsv4", "peak memory"): {2048: 7.0},
    }
    assert formula == {2048: 5.0}


def test_the_table_names_llamas_best_and_what_failed() -> None:
    rows = [row("dsv4", "decode", 0, 500.0), row("llama.cpp q8_0 fa", "decode", 0, 222.0)]
    outcome = Outcome("slice", plan.SHAPE, rows, CEILINGS, {}, 1e-6, ["llama.cpp bf16, prefill: it died"])
    text = "\n".join(table.notes(outcome))
    assert "decode 0: q8_0 fa" in text and "failed: llama.cpp bf16, prefill: it died" in text
    cells = [list(column.cells) for column in table.make_table(outcome).columns]
    assert ["2.25 x"] in cells and ["[green]met[/]"] in cells
