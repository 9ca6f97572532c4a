"""`dsv4 bench serving`: client, loads, subjects end to end at small sizes, tables, plots. llama-server is fake."""

from __future__ import annotations

import asyncio
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks/ belongs to the checkout, not to the installed package

from benchmarks import report as bench_report  # noqa: E402
from benchmarks import serving as bench  # noqa: E402
from benchmarks.harness import (  # noqa: E402
    agent,
    load,
    load_rounds,
    prefix,
    results,
    servers,
    serving_plot,
    serving_report,
    stream_client,
    streams,
)
from benchmarks.harness.client import Reply, chat  # noqa: E402
from benchmarks.harness.process import BenchmarkError  # noqa: E402
from benchmarks.harness.results import Row, Run  # noqa: E402
from benchmarks.harness.scenarios import NANO, SCENARIOS  # noqa: E402
from dsv4.config import nano_path  # noqa: E402

CEILINGS = {"copy_bytes_per_s": 3e10, "read_bytes_per_s": 4e10, "fp32_flop_per_s": 1e11, "bf16_flop_per_s": 3e11}
# A server with the flags of llama-server: each answer has as many tokens as asked for, or SHORT fewer.
FAKE = f"""#!{sys.executable}
import http.server, json, sys
flags = sys.argv[1:]
assert flags[flags.index("-np") + 1] in "124" and "--no-cache-prompt" in flags and "--kv-unified" in flags
port = int(flags[flags.index("--port") + 1])
FAILING

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    log_message = lambda *_: None

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked["stream"] and asked["ignore_eos"] and asked["cache_prompt"] is False
        count = asked["max_tokens"] - (SHORT if len(asked["messages"][0]["content"]) > 20 else 0)
        events = [{{"choices": [{{"delta": {{"role": "assistant", "content": None}}}}]}}]
        events += [{{"choices": [{{"delta": {{"content": f"t{{i}}"}}}}]}} for i in range(count)]
        usage = {{"prompt_tokens": PROMPT(asked), "completion_tokens": count}}
        events.append({{"choices": [], "usage": usage}})
        body = b": ping\\n\\n" + b"".join(b"data: " + json.dumps(e).encode() + b"\\n\\n" for e in events)
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for start in range(0, len(body), 37):  # chunks that end within lines
            piece = body[start : start + 37]
            self.wfile.write(b"%x\\r\\n%s\\r\\n" % (len(piece), piece))
        self.wfile.write(b"0\\r\\n\\r\\n")

sys.path.insert(0, {str(ROOT)!r})
from dsv4.config import nano_path
from dsv4.tokenizer.prompts import PromptEncoder
import deepseek_recipe as recipe
encoder = PromptEncoder.from_pretrained(nano_path())

def PROMPT(asked):
    request = {{"model": "deepseek-v4-flash", "messages": asked["messages"], "thinking": {{"type": "disabled"}}}}
    conversation = recipe.ChatCompletionRequest(json.dumps(request).encode()).convert(OPTIONS).conversation
    return len(encoder.encode(conversation))

from dsv4.server.model_names import conversion_options
OPTIONS = conversion_options(["deepseek-v4-flash"])
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def fake(tmp_path: Path) -> Callable[..., Path]:
    def make(short: int = 0, failing: str = "") -> Path:
        path = tmp_path / "llama-server"
        path.write_text(FAKE.replace("SHORT", str(short)).replace("FAILING", failing))
        path.chmod(0o755)
        return path

    return make


def run_bench(folder: Path, subject: str, *more: str) -> Run:
    common = ["--quick", "--no-gate", "--rounds", "1", "--threads", "1", "--results", str(folder)]
    assert bench.main([subject, *common, *more]) == 0
    (file,) = folder.glob("*.jsonl")
    return results.read(file)[-1]


def test_every_server_has_every_figure_under_load(
    tmp_path: Path, fake: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--levels", "2", "--without-transformers", "--llama-server", str(fake()))
    run = run_bench(tmp_path / "results", "load", *flags)
    assert run.scenario == "serving load nano" and not run.failures
    for peer in ("dsv4", "llama.cpp"):
        found = {row.measure: row for row in run.rows if (row.peer, row.tokens) == (peer, 2)}
        assert len(found) == 7 and all(row.median > 0 for row in found.values())
        assert found["total tokens"].median > found["output tokens"].median
        assert found["total tokens"].floor > 0 == found["first token, median"].floor
        assert found["first token, p95"].median >= found["first token, median"].median
    printed = capsys.readouterr().out
    assert "| total tokens, 2" in printed and "UNGATED" in printed and "llama.cpp 0 %" in printed


def test_a_server_that_fails_is_named_and_the_others_go_on(tmp_path: Path, fake: Callable[..., Path]) -> None:
    program = fake(failing='if "on" in flags: sys.exit("no flash attention here")')
    flags = ("--levels", "1", "--without-transformers", "--llama-server", str(program))
    run = run_bench(tmp_path / "results", "load", *flags)
    assert len(run.failures) == 2 and all("no flash attention here" in text for text in run.failures)
    assert run.find("llama.cpp", "total tokens", 1) is not None


def test_answers_of_other_lengths_are_refused(
    tmp_path: Path, fake: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--levels", "1", "--without-transformers", "--llama-server", str(fake(short=1))]
    assert bench.main(["load", "--quick", "--no-gate", "--results", str(tmp_path / "results"), *flags]) == 1
    assert "answers have not 4 tokens, but [3]" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_a_repeated_prompt_comes_from_memory(tmp_path: Path) -> None:
    run = run_bench(tmp_path / "results", "prefix")
    cold, memory = (run.find(peer, prefix.MEASURE, 600) for peer in (prefix.COLD, prefix.MEMORY))
    assert cold and memory and memory.median < cold.median
    stored = run.find(prefix.MEMORY, prefix.BYTES, 600)
    assert stored and stored.median > 10_000
    assert {row.peer for row in run.rows} == {prefix.COLD, prefix.MEMORY, *prefix.POLICIES}


def test_an_agents_turns_hit_the_cache_with_the_same_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_bench(tmp_path / "results", "agent")
    for name in agent.SAMPLINGS:
        assert agent.hit_rate(run, name, 2) > 0.9 > agent.hit_rate(run, name) > 0
        assert [row.tokens for row in agent.turns_of(run, agent.NO_CACHE, f"{agent.FIRST}, {name}")] == [1, 2, 3]
    assert not sum(row.median for row in agent.turns_of(run, agent.NO_CACHE, f"{agent.CACHED}, greedy"))
    assert "All 6 answers equal those without a cache." in capsys.readouterr().out


def test_streams_are_right_and_their_cost_and_memory_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_bench(tmp_path / "results", "streams")
    ends = run.settings["ends"]
    assert (
        ends.keys() <= {"prompt: right", "slow: right", "vanished"} and ends["prompt: right"] > 5 and not run.failures
    )
    for peer, measure in (
        (streams.BARE, streams.RATE),
        (streams.HTTP, streams.PROCESSOR),
        (streams.ENGINE, streams.PROCESSOR),
    ):
        row = run.find(peer, measure, 12)
        assert row is not None and row.median > 0
    assert len([row for row in run.rows if row.measure == streams.MEMORY and min(row.samples) > 1e7]) == 2
    printed = capsys.readouterr().out
    assert "12 streams at a time" in printed and "The server's process takes" in printed and "prompt: right" in printed


def test_an_answer_of_another_request_or_a_cut_one_is_a_fault() -> None:
    def answer(*events: str, end: bytes = b"0\r\n\r\n") -> bytes:
        body = "".join(f"data: {event}\n\n" for event in events).encode()
        return b"HTTP/1.1 200 OK\r\n\r\n" + b"%x\r\n%s\r\n" % (len(body), body) + end

    part = '{"choices": [{"delta": {"content": "ab"}}], "usage": {"completion_tokens": 2}}'
    good = stream_client.heard(answer(part, "[DONE]"))
    assert good == stream_client.Heard("ab", 2) and streams._fault(good, "ab") is None
    assert streams._fault(good, "cd") == "'ab' in place of 'cd'"
    for bad, words in (
        (answer(part), "no end"),
        (answer(part, "[DONE]", end=b""), "cut off"),
        (answer('{"error": {"message": "no"}}', "[DONE]"), "no"),
        (b"HTTP/1.1 503 Busy\r\n\r\n{}", "refused"),
    ):
        assert words in str(streams._fault(stream_client.heard(bad), "ab"))


def test_growth_is_of_the_second_half() -> None:
    flat = Row(streams.HTTP, streams.MEMORY, 60, [1.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0], 0.0)
    assert streams.grown(flat) == 0
    assert streams.grown(replace(flat, samples=[1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 4.0, 4.0])) == 1.0
    assert streams.grown(replace(flat, samples=[7.0])) == 0


def test_an_answer_that_the_cache_changes_gives_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    async def answer(port: int, request: dict[str, Any]) -> Reply:
        return Reply(100, 4, 0, f"from {port}", 0.1, 0.2)

    monkeypatch.setattr(agent, "chat", answer)
    session = agent.Session(nano_path(), 1, "nano", turns=2, tokens=100)
    running: Any = {name: servers.Running(None, port) for port, name in enumerate(agent.FLAGS)}  # type: ignore[arg-type]
    with pytest.raises(BenchmarkError, match="greedy, turn 1: the answers differ: .*from 0.*from 1"):
        asyncio.run(session._replay(running, "greedy", agent.SAMPLINGS["greedy"], str))


def test_a_refusal_and_a_dead_server_are_told() -> None:
    with pytest.raises(BenchmarkError, match="no complete answer: ConnectionRefusedError"):
        asyncio.run(chat(servers.free_port(), {}))
    dead = servers.Server("some server", [sys.executable, "-c", "raise SystemExit('no such model')"])
    words = "some server: ended with status 1 before it was ready\nno such model"
    with pytest.raises(BenchmarkError, match=words), dead.running(1):
        pass


def test_prompts_have_the_lengths_that_a_load_asks_for_and_no_common_beginning() -> None:
    many = load.Load(8, 64, 100, 8000, 4)
    lengths = many.lengths(1)
    assert lengths == many.lengths(1) != many.lengths(2) and sorted(lengths) == sorted(many.lengths(2))
    assert 100 <= min(lengths) < 110 and 7400 < max(lengths) <= 8000 and many.context > 8004
    rounds = load_rounds.LoadRounds(SCENARIOS["nano"], [many], 1, 1, Path(), None, False, 1.0)
    rounds._writer = load.writer(nano_path())
    texts = rounds._prompts(replace(many, requests=4), 0)
    assert texts == rounds._prompts(replace(many, requests=4), 0) and len({text[:40] for text in texts}) == 4
    tokens = [len(ids) for ids in map(load.Tokenizer.from_pretrained(nano_path()).encode, texts)]
    asked = replace(many, requests=4).lengths(load_rounds.SEED)
    assert all(0.9 < found / length < 1.1 for found, length in zip(tokens, asked, strict=True))


def test_a_load_that_would_take_too_long_is_left_out() -> None:
    slow = load.Measured([Reply(1000, 4, 0, "", 1.0, 2.0)], 10.0, 1)
    big = load.Load(32, 32, 1000, 2000, 4)
    rounds = load_rounds.LoadRounds(SCENARIOS["nano"], [big], 1, 1, Path(), None, False, 180.0)
    rounds.measured["transformers", 1].append(slow)
    assert rounds._take("transformers", lambda _: servers.Server("transformers", []), big, str, 0) is None
    assert "left out, it would take about" in rounds.failures["transformers", 32]


def test_percentiles_are_of_the_values() -> None:
    assert load.percentile([3.0, 1.0, 2.0], 0.95) == 3.0 and load.percentile(list(range(1, 101)), 0.95) == 95
    measured = load.Measured([Reply(10, 5, 0, "a", 1.0, 3.0), Reply(20, 5, 0, "a", 2.0, 2.0)], 4.0, 7)
    assert measured.figures() == {
        "total tokens": 10.0, "output tokens": 2.5, "first token, median": 1.5, "first token, p95": 2.0,
        "between tokens, median": 0.25, "between tokens, p95": 0.5, "peak memory": 7.0,
    }  # fmt: skip


def test_the_floor_is_operations_or_weights_read_per_step() -> None:
    ample = {**CEILINGS, "read_bytes_per_s": 1e30}
    one, two = (load_rounds.floor_s(NANO, [1000] * count, 8, 1, ample) for count in (1, 2))
    assert two == pytest.approx(2 * one) and one > 0
    starved = {**CEILINGS, "read_bytes_per_s": 1.0}
    alone, together = (load_rounds.floor_s(NANO, [1000] * 4, 8, level, starved) for level in (1, 4))
    assert alone == pytest.approx(4 * together)


def example() -> list[Run]:
    hardware = {"cpu": "Some CPU", "isa": "AVX2", "cores": 2}
    rates = [Row(peer, "total tokens", 32, [rate], 9e4) for peer, rate in (("dsv4", 9000.0), ("llama.cpp", 3000.0))]
    waits = [Row(peer, "first token, median", 32, [s], 0.0) for peer, s in (("dsv4", 0.5), ("llama.cpp", 2.0))]
    settings = {"answer": 64, "alike": {"dsv4": 1.0, "llama.cpp": 0.9}}
    loaded = Run("serving load nano", [*rates, *waits], CEILINGS, settings, hardware=hardware, commit="abc")
    sources = ((prefix.COLD, 2.0), (prefix.MEMORY, 0.01), ("full", 0.05))
    rows = [Row(name, prefix.MEASURE, 32768, [value], 0.001) for name, value in sources]
    rows += [Row(name, prefix.BYTES, 32768, [1e7], 0.0) for name, _ in sources[1:]]
    repeated = Run("serving prefix nano", rows, CEILINGS, {}, hardware=hardware, commit="abc")
    return [repeated, loaded]


def test_the_document_and_the_plot_have_the_subjects(tmp_path: Path) -> None:
    for run in example():
        results.append(tmp_path / "some.jsonl", run)
    text = bench_report.document(tmp_path)
    assert text.index("### serving load nano") < text.index("### serving prefix nano")
    cells = {
        line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]]
        for line in text.splitlines()
        if "|" in line
    }
    assert cells["total tokens, 32"][:4] == ["9,000", "10 %", "3,000", "3.00"]
    assert cells["first token, median, 32"][:4] == ["500 ms", "", "2,000 ms", "4.00"]
    assert cells["memory"] == ["10.0 ms", "0.50 %", "1.0 ms", "10.00 MB"]
    assert cells["disk after a restart, full"][1] == "2.50 %"
    assert serving_report.command(example()[0]) == "`dsv4 bench serving prefix --model nano`"
    pytest.importorskip("matplotlib")
    assert serving_plot.plot_serving(tmp_path) == [tmp_path / "some-serving.png"]
    assert (tmp_path / "some-serving.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["load"], "give --llama-server PATH (make llama-server), or --without-llama"),
        (["flood"], "invalid choice: 'flood'"),
        (["load", "--levels", "0,1", "--without-llama"], "1 or more"),
    ],
)
def test_wrong_arguments_are_refused_with_what_is_allowed(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert message in capsys.readouterr().err


def test_every_documented_command_is_one() -> None:
    documented = re.findall(r"`dsv4 bench serving (.+?)`[,;]", bench_report.SERVING)
    examples = re.findall(r"^  dsv4 bench serving (.+)$", bench.EPILOG, flags=re.M)
    commands = [shlex.split(text.replace("$(make llama-server | tail -n 1)", "PATH")) for text in documented + examples]
    assert [bench._parser().parse_args(command).subject for command in commands] == [
        *bench.SUBJECTS, "load", "prefix", "agent", "streams", "load",
    ]  # fmt: skip
    assert "\nllama-server:" in (ROOT / "Makefile").read_text()
