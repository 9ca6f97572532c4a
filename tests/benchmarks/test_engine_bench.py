"""`dsv4 bench engine` and `dsv4 bench report`: figures, saved rows, tables, refusals. Contenders run in process."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks/ belongs to the checkout, not to the installed package

from benchmarks import engine as bench  # noqa: E402
from benchmarks import report as bench_report  # noqa: E402
from benchmarks.harness import contenders, gate, llama_cpp, machine, peers, plot, process, results, rounds  # noqa: E402
from benchmarks.harness.process import BenchmarkError  # noqa: E402
from benchmarks.harness.results import Row, Run, Sample  # noqa: E402
from benchmarks.harness.scenarios import FLASH_WIDTH, SCENARIOS, SLICE, TINY, quick  # noqa: E402
from benchmarks.harness.servers import Server  # noqa: E402
from benchmarks.harness.turns import in_turns  # noqa: E402
from dsv4.config import ModelConfig, nano_path  # noqa: E402

CEILINGS = {"copy_bytes_per_s": 3e10, "read_bytes_per_s": 4e10, "fp32_flop_per_s": 1e11, "bf16_flop_per_s": 3e11}
FAKE = """#!/bin/sh
# Answers as llama-bench does, a hundredth of a second after it was asked.
case "$*" in *--help*) echo "--n-prompt --n-depth --flash-attn"; exit;; esac
after() { echo "$*" | sed -n "s/.* -$option \\([0-9]*\\).*/\\1/p"; }
option=p; prompt=$(after "$@")
option=n; steps=$(after "$@")
option=d; depth=$(after "$@")
rate=100 depth=${depth:-0}
case "$*" in *q8_0*) rate=101;; esac
case "$*" in *" -fa on"*) rate=$((rate + 2));; esac
[ "$prompt" = FAILS_AT ] && { echo "out of cells" >&2; exit 1; }
[ "$(head -c 4 "$2")" = GGUF ] || { echo "no GGUF" >&2; exit 1; }
sizes="\\"n_prompt\\": $prompt, \\"n_gen\\": $steps, \\"n_depth\\": $depth"
echo "[{$sizes, \\"avg_ts\\": $rate, \\"build_commit\\": \\"fake\\"}]"
"""


class Here:
    """Stand-in for Process that runs in the test process."""

    def __init__(self, name: str, threads: int, limit_bytes: int | None = None) -> None:
        pass

    def call(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        with torch.inference_mode():
            return function(*arguments, **named)

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *error: object) -> None:
        pass


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (contenders, rounds):
        monkeypatch.setattr(module, "Process", Here)


def fake(tmp_path: Path, fails_at: int = -1) -> Path:
    path = tmp_path / "llama-bench"
    path.write_text(FAKE.replace("FAILS_AT", str(fails_at)))
    path.chmod(0o755)
    return path


def run_bench(results_folder: Path, *more: str) -> Run:
    arguments = ["--quick", "--no-gate", "--threads", "1", "--results", str(results_folder), *more]
    assert bench.main(arguments) == 0
    (file,) = results_folder.glob("*.jsonl")
    (run,) = results.read(file)
    return run


@pytest.mark.usefixtures("here")
def test_a_compared_scenario_has_every_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama = fake(tmp_path, fails_at=130)
    run = run_bench(tmp_path / "results", "--models", "slice", "--llama-bench", str(llama))
    scenario = quick(SCENARIOS["slice"])
    for measure, tokens in scenario.measures():
        ours = run.find("dsv4", measure, tokens)
        assert ours is not None and ours.median > 0 and ours.floor > 0
        theirs = run.find("llama.cpp", measure, tokens)
        asked = tokens != 130 if measure == "prefill" else tokens <= 40
        assert (theirs is not None and (theirs.peer, theirs.median) == ("llama.cpp q8_0 fa", 103.0)) == asked
        assert (run.find("transformers", measure, tokens) is not None) == scenario.asks("transformers", measure, tokens)
    turns = [run.find("dsv4", "decode in turns", depth) for depth in scenario.decode]
    assert [len(row.samples) for row in turns if row] == [scenario.turns] * len(scenario.decode)
    assert run.deviation is not None and 0 < run.deviation < gate.TOLERANCE
    assert len(run.failures) == 4 and "out of cells" in run.failures[0]
    assert run.settings["llama.cpp"]["build_commit"] == "fake" and run.quick and not run.gated
    printed = capsys.readouterr().out
    assert "UNGATED" in printed and "q8_0 fa" in printed and "Failed: llama.cpp" in printed


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", ["flash-width", "million"])
def test_a_scenario_without_peers_is_compared_with_the_machine(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_bench(tmp_path / "results", "--models", name)
    printed = capsys.readouterr().out
    if name == "million":
        assert {row.tokens for row in run.rows} == {128, 256}
        peak = run.find("dsv4", "peak memory", 256)
        assert peak is not None and peak.median > peak.floor > 0 and "KV formula" in printed
    else:
        assert {row.peer for row in run.rows} == {"dsv4", "dsv4 shipped"} and "of a copy" in printed
        assert run.settings["dsv4 shipped"]["numerics"] == "shipped"


def measured(scenario: Any, *rest: object) -> Run:
    rows = [Row("dsv4", "decode", 0, [5.0], 9.0), Row("transformers", "decode", 0, [2.0], 9.0)]
    return Run(scenario.name, rows, CEILINGS, {"dsv4": {}})


def test_rows_stay_although_a_later_scenario_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[Any, ...]] = []

    def measure(scenario: Any, threads: int, scratch: Path, llama: object, advance: object) -> Run:
        asked.append((scenario.name, scenario.rounds, threads, scratch, llama))
        if scenario.name == "nano":
            raise BenchmarkError("dsv4 was killed by SIGKILL")
        return measured(scenario)

    monkeypatch.setattr(rounds, "measure", measure)
    folder, scratch = tmp_path / "results", tmp_path / "kept"
    arguments = ["--without-llama", "--no-gate", "--rounds", "5", "--scratch", str(scratch), "--results", str(folder)]
    assert bench.main(arguments) == 1
    assert asked == [(name, 5, 2, scratch, None) for name in ("slice", "nano")]
    printed = capsys.readouterr()
    assert "2.50" in printed.out and "killed by SIGKILL" in printed.err
    (file,) = folder.glob("*.jsonl")
    assert [run.scenario for run in results.read(file)] == ["slice"]


def test_a_package_that_changes_during_the_run_gives_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    digests = iter("ab")
    monkeypatch.setattr(results, "package_digest", lambda: next(digests))
    monkeypatch.setattr(rounds, "measure", measured)
    assert bench.main(["--models", "million", "--no-gate", "--results", str(tmp_path / "results")]) == 1
    assert "changed during the run" in capsys.readouterr().err and not (tmp_path / "results").exists()


def test_the_digest_is_of_the_sources(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text("VALUE = 1\n")
    before = results.package_digest(tmp_path)
    (tmp_path / "module.py").write_text("VALUE = 2\n")
    assert results.package_digest(tmp_path) != before == before


def test_a_wrong_path_to_llama_bench_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
        (["--models", "slice,wide"], "'wide' is unknown; allowed: slice, nano, fp32, flash-width, million"),
        (["--rounds", "0"], "1 or more"),
    ],
)
def test_wrong_arguments_are_refused_with_what_is_allowed(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert message in capsys.readouterr().err


def test_a_red_gate_writes_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def red() -> None:
        raise BenchmarkError("the frozen tests are red")

    monkeypatch.setattr(gate, "run_tests", red)
    assert bench.main(["--quick", "--without-llama", "--results", str(tmp_path)]) == 1
    assert "red" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_gate_shows_a_red_test_and_names_a_missing_one(tmp_path: Path) -> None:
    (tmp_path / "test_red.py").write_text("def test_two(): assert 1 == 2\n")
    with pytest.raises(BenchmarkError, match="1 == 2"):
        gate.run_tests(("test_red.py",), tmp_path)
    with pytest.raises(BenchmarkError, match="test_gone.py"):
        gate.run_tests(("test_red.py", "test_gone.py"), tmp_path)


@pytest.mark.parametrize("wrong", [1.001, float("nan")])
def test_no_numbers_when_the_logits_disagree(wrong: float) -> None:
    right = np.random.default_rng(0).normal(size=(3, 40))
    assert gate.deviation(right * (1 + 1e-6), right) < 1e-5
    other = right.copy()
    other[1, 7] *= wrong
    other[0, np.abs(right[0]).argmax()] *= wrong
    with pytest.raises(BenchmarkError, match="logits disagree"):
        gate.deviation(other, right)


def test_a_contender_that_fails_or_dies_is_named(tmp_path: Path) -> None:
    with process.Process("dsv4", 1) as worker:
        with pytest.raises(BenchmarkError, match=r"dsv4 failed in 'load dsv4 .*nothing': CheckpointError: "):
            worker.call(peers.load, "dsv4", tmp_path / "nothing")
        with pytest.raises(BenchmarkError, match=r"dsv4 ended \(out of memory\?\) in 'abort'"):
            worker.call(os.abort)


def test_dsv4s_settings_of_torch_stay_with_dsv4(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = {"MKL_CBWR": "AVX2,STRICT", "GOMP_SPINCOUNT": "1000"}
    for name in ("dsv4", "dsv4 bf16", "transformers"):
        monkeypatch.setattr(os, "environ", dict(ours))
        process.start(name, torch.get_num_threads())
        assert (ours.items() <= os.environ.items()) == name.startswith("dsv4")
        assert bool({*ours} & {*os.environ}) == name.startswith("dsv4")


def test_peers_programs_start_without_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MKL_CBWR", "AVX2,STRICT")
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")
    code = "import os; print([os.environ.get(name) for name in ('MKL_CBWR', 'GOMP_SPINCOUNT')])"
    assert llama_cpp._run([sys.executable, "-c", code])[0].strip() == "[None, None]"
    seen = tmp_path / "seen"
    code = f"open({str(seen)!r}, 'w').write(str([name in __import__('os').environ for name in {process.OURS}]))"
    with pytest.raises(BenchmarkError), Server("peer", [sys.executable, "-c", code], "--port").running(1):
        pass  # it ends without listening
    assert seen.read_text() == "[False, False]"


def test_llama_bench_that_aborts_on_repacked_weights_gets_them_plain(tmp_path: Path) -> None:
    gguf = tmp_path / "q8_0.gguf"
    gguf.write_bytes(b"GGUF")
    path = fake(tmp_path)
    names = [contender.name for contender in llama_cpp.contenders(path, [gguf], 1, 4)]
    assert names == ["llama.cpp q8_0", "llama.cpp q8_0 fa"]
    path.write_text(path.read_text().replace("option=p;", 'case "$*" in *--repack*) ;; *) exit 6;; esac\noption=p;'))
    plain = llama_cpp.contenders(path, [gguf], 1, 4)
    assert [contender.name for contender in plain] == ["llama.cpp q8_0 repack 0", "llama.cpp q8_0 repack 0 fa"]
    assert plain[1].take("prefill", 64, 0).rate > 0 and plain[1].build["build_commit"] == "fake"


@pytest.mark.parametrize("answer", ["", "[]", "{}", '[{"n_prompt": 8, "avg_ts": 0}]', '[{"n_prompt": 9, "avg_ts": 1}]'])
def test_an_answer_without_exactly_one_figure_is_refused(answer: str) -> None:
    with pytest.raises(BenchmarkError, match="not one figure of .*8"):
        llama_cpp.parse(answer, {"n_prompt": 8})


class Stub:
    """Fake contender that records its calls."""

    def __init__(self, name: str, wall_s: float = 1.0) -> None:
        self.name, self.wall_s, self.asked = name, wall_s, []
        self.stays = not name.startswith("llama")

    def take(self, measure: str, tokens: int, turn: int) -> Sample:
        self.asked.append(tokens)
        if not self.stays and tokens > 64:
            raise BenchmarkError("out of cells")
        return Sample(1.0, self.wall_s, 100 + tokens)


def test_rounds_skip_failed_and_slow_figures() -> None:
    ours, slow, llama = Stub("dsv4"), Stub("transformers", wall_s=60.0), Stub("llama.cpp bf16")
    scenario = replace(SCENARIOS["slice"], prefill=(64, 128), decode=(), budget_s=100.0)
    recorder = rounds.Recorder(scenario, str)
    samples = in_turns(recorder.takes([ours, slow, llama]), 3)
    assert ours.asked == [64, 128, 128, 64, 64, 128]  # every second round backwards
    assert slow.asked == [64, 128, 128, 64] and llama.asked == [64, 128, 64, 64]
    assert len(samples["llama.cpp bf16", "prefill", 64]) == 3 and not samples["llama.cpp bf16", "prefill", 128]
    assert list(recorder.failures) == [("llama.cpp bf16", "prefill", 128)]


def test_a_long_lived_process_has_peaks_of_growing_lengths_only() -> None:
    scenario = replace(SCENARIOS["slice"], prefill=(64, 512), decode=(128, 1024))
    recorder = rounds.Recorder(scenario, str)
    in_turns(recorder.takes([Stub("dsv4")]), 2)
    assert set(recorder.peaks) == {("dsv4", 64), ("dsv4", 512), ("dsv4", 1024)}


def test_floors_are_weight_bytes_per_token_and_operations_per_prompt() -> None:
    """A token's weights exclude the embedding and all but 6 of Flash's 256 routed experts."""
    expert = 3 * 4096 * 2048 * (1 / 2 + 1 / 32)
    least = 2 * 6 * expert + 2 * 3 * 4096 * 2048
    used = machine.token_bytes(FLASH_WIDTH, "official")
    assert least < used < 2.5 * least
    assert machine.stored_bytes(FLASH_WIDTH, "official") - used == 2 * 250 * expert + 1024 * 4096 * 2
    assert machine.floor(SLICE, "fp32", "decode", 0, CEILINGS) == pytest.approx(4e10 / 28_661_173 / 4, rel=1e-4)
    assert machine.floor(SLICE, "fp32", "peak memory", 0, CEILINGS) == pytest.approx(120_935_861 * 4, rel=1e-2)
    without_head = 28_661_173 - 8192 * 512
    short, long = (machine.prefill_flops(SLICE, n) / n for n in (512, 8192))
    assert 2 * without_head < short < long < 4 * without_head


def test_kv_formula_of_the_caches_formats() -> None:
    config = ModelConfig.from_pretrained(nano_path())
    fp32, bf16, fp8 = (machine.kv_bytes(config, 2**20, size) for size in (4, 2, 1))
    assert fp32 > 1.9 * bf16 > 1.9 * fp8 > 0
    model_bytes = 2 * 2**18 * (64 + 32) * 4 + 2 * 2**13 * 64 * 4  # entries and index keys of two CSA and two HCA layers
    assert fp32 == pytest.approx(model_bytes, rel=0.01)


def test_processors_of_one_name_have_files_of_their_own() -> None:
    found = {"cpu": "Intel(R) Xeon(R) Processor @ 2.60GHz", "isa": "AMX", "cores": 2}
    assert machine.hardware_slug(found) == "intel-xeon-processor-amx-2-cores"
    assert machine.hardware_slug({**found, "isa": "AVX-512"}) == "intel-xeon-processor-avx-512-2-cores"
    assert machine.hardware()["memory_bytes"] > 1e9


def example(**more: Any) -> Run:
    rows = [
        Row("dsv4", "decode", 0, [440.0, 450.0, 400.0], 900.0),
        Row("dsv4", "prefill", 2048, [4000.0], 9000.0),
        Row("llama.cpp bf16", "decode", 0, [200.0], 900.0),
        Row("llama.cpp q8_0 fa", "decode", 0, [222.0], 900.0),
        Row("dsv4", "peak memory", 2048, [2e9], 1e9),
    ]
    hardware = {"cpu": "Some CPU", "isa": "AVX2", "cores": 2}
    settings = {"dsv4": {}, "llama.cpp": {}}
    return Run("slice", rows, CEILINGS, settings, 1e-6, hardware=hardware, commit="abc", **more)


def test_saved_rows_are_read_back_unchanged(tmp_path: Path) -> None:
    runs = [example(), example(quick=True)]
    for run in runs:
        results.append(tmp_path / "some.jsonl", run)
    assert results.read(tmp_path / "some.jsonl") == runs
    assert results.newest(results.read(tmp_path / "some.jsonl")) == {"slice": runs[0]}
    (tmp_path / "wrong.jsonl").write_text('{"peer": "dsv4"}\n')
    with pytest.raises(ValueError, match=r"wrong.jsonl:1: a row before the first run"):
        results.read(tmp_path / "wrong.jsonl")


def test_a_failure_is_kept_without_the_folders_of_the_machine(tmp_path: Path) -> None:
    run = example()
    run.failures = ["llama.cpp at 1/2: ended\nloading '/some/folder-1/model.gguf' -m /a/b.gguf"]
    results.append(tmp_path / "some.jsonl", run)
    assert results.read(tmp_path / "some.jsonl")[0].failures == [
        "llama.cpp at 1/2: ended\nloading 'model.gguf' -m b.gguf"
    ]


def test_the_document_has_a_table_per_processor_and_llamas_best(tmp_path: Path) -> None:
    results.append(tmp_path / "some.jsonl", example())
    text = bench_report.document(tmp_path)
    assert "## Some CPU with AVX2, 2 cores" in text and "decode 0 q8_0 fa" in text
    assert re.search(r"^\| decode, 0 +\| +1.98 \|$", text, flags=re.M)
    assert "440 ±6 %" in text and "2.00 x" in text
    found = plot.curves(results.newest(results.read(tmp_path / "some.jsonl")))
    assert found["slice", "llama.cpp", "decode"] == {0: 222.0}


def test_the_benchmarks_page_is_up_to_date() -> None:
    kept = ROOT / "docs" / "benchmarks.md"
    assert kept.read_text(encoding="utf-8") == bench_report.document(ROOT / "benchmarks" / "results")


def test_the_tiny_shape_has_every_kind_of_layer() -> None:
    assert set(TINY.compress_ratios) == {0, 4, 128} and TINY.num_hash_layers
