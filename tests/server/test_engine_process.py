"""The engine in a process of its own: crashes under open requests, restarts, errors, shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, cast

import httpx
import openai
import pytest

from dsv4.checkpoint.errors import CheckpointError
from dsv4.engine import LLM, AsyncEngine, EngineError, QueueFullError, SamplingParams
from dsv4.engine.capacity import CapacityError
from dsv4.engine.config import EngineConfig
from dsv4.engine.errors import EngineCrashedError, QueueTimeoutError
from dsv4.engine.grammar import GrammarCompiler, GrammarError
from dsv4.engine.outputs import ProgressEvent, Timings, TokenEvent
from dsv4.engine.process.client import EngineProcess
from dsv4.engine.process.messages import pack, unpack
from dsv4.engine.process.portable_errors import PortableError
from dsv4.engine.process.restarts import RestartPolicy
from dsv4.server.loading import load_llm

from . import patient
from .conftest import Served, serving
from .scripted_engine import (
    endless_to_trace,
    killed_while_it_loads,
    loads_once,
    scripted_llm,
    slow_at_first,
    slow_to_compile,
    slow_to_load,
)
from .test_drain import NO_KEEP_ALIVE, Reader, process_serving

CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5000}
LONG = "</think>" + "word " * 3000
SHORT = SamplingParams(max_tokens=8, seed=1)
FIELDS = {"reply": LONG, "seconds_per_step": 0.01}
HANG = 300.0  # seconds after which something has gone wrong on the slowest machine


@contextlib.contextmanager
def engine_of(make: Callable[[], LLM], **options: Any) -> Iterator[EngineProcess]:
    engine = EngineProcess(make, **options)
    try:
        yield engine
    finally:
        engine.close()


@contextlib.contextmanager
def served(folder: Path, fields: dict[str, object] = FIELDS, **options: Any) -> Iterator[Served]:
    engine = EngineProcess(partial(scripted_llm, folder, fields), **options)
    with serving(engine) as running:  # type: ignore[arg-type]
        yield running


def until(condition: Callable[[], object], seconds: float = HANG) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def run(work: Any) -> Any:
    """asyncio.run in a thread of its own: other tests may leave an event loop running in this one."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result(HANG)


async def collect(engine: EngineProcess, prompt: list[int], params: SamplingParams = SHORT) -> list[int]:
    return [token async for event in engine.stream(prompt, params) for token in event.token_ids]


def alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS])
def test_a_crash_ends_streams_and_whole_answers_and_the_engine_comes_back(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr("dsv4.engine.process.restarts.FIRST_PAUSE_SECONDS", 4.0)  # a busy machine is not back by then
    with served(folder) as server:
        engine = server.engine
        assert isinstance(engine, EngineProcess) and engine.pid is not None
        first = engine.pid
        answers: dict[str, Any] = {}

        def whole() -> None:
            answers["whole"] = httpx.post(server.url + CHAT, json=BODY, timeout=HANG)

        thread = threading.Thread(target=whole)
        thread.start()
        with (
            httpx.stream("POST", server.url + CHAT, json=BODY | {"stream": True}, timeout=HANG) as chat,
            httpx.stream("POST", server.url + MESSAGES, json=BODY | {"stream": True}, timeout=HANG) as messages,
        ):
            chat_lines, message_lines = chat.iter_lines(), messages.iter_lines()
            next(chat_lines), next(message_lines)
            server.wait_until_running(3, HANG)
            os.kill(first, number)
            chat_rest = [line for line in chat_lines if line]
            message_rest = [line for line in message_lines if line]
        thread.join(HANG)
        told = json.loads(chat_rest[-1].removeprefix("data: "))["error"]
        assert told["type"] == "service_unavailable" and number.name in told["message"]
        assert message_rest[-2] == "event: error"
        assert json.loads(message_rest[-1].removeprefix("data: "))["error"]["type"] == "overloaded_error"
        refused = answers["whole"]
        assert refused.status_code == 503 and number.name in refused.json()["error"]["message"]
        assert int(refused.headers["retry-after"]) >= 1 and refused.headers["x-should-retry"] == "true"
        assert f"the engine process was killed by {number.name}" in caplog.text
        assert "Traceback" not in caplog.text  # one for each stream would bury that line

        health = patient.get(server.url + "/health")  # the load takes seconds: it is not back yet
        assert health.status_code == 503 and health.json()["status"] == "restarting"
        assert int(health.headers["retry-after"]) >= 1
        late = patient.post(server.url + CHAT, json=BODY)
        assert late.status_code == 503 and late.headers["x-should-retry"] == "true"
        until(lambda: patient.get(server.url + "/health").status_code == 200)
        assert engine.pid != first and not alive(first)
        again = httpx.post(server.url + CHAT, json=BODY | {"max_tokens": 4}, timeout=HANG)
        assert again.status_code == 200 and again.json()["usage"]["completion_tokens"] == 4
        metrics = patient.get(server.url + "/metrics").text
        assert 'dsv4:engine_restarts_total{model_name="tiny"} 1.0' in metrics
        assert "vllm:generation_tokens_total" in metrics
        assert "the engine process has been started again" in caplog.text


def test_the_sdk_repeats_a_request_that_a_crash_has_ended(folder: Path, tmp_path: Path) -> None:
    engine = EngineProcess(partial(slow_at_first, folder, tmp_path / "started", 10 * HANG))
    with serving(engine) as server:  # type: ignore[arg-type]
        assert isinstance(server.engine, EngineProcess) and server.engine.pid is not None
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=10)
        with client, ThreadPoolExecutor(1) as pool:
            answer = pool.submit(client.chat.completions.create, **BODY)  # type: ignore[arg-type]
            server.wait_until_running(1, HANG)
            os.kill(server.engine.pid, signal.SIGKILL)
            assert answer.result(HANG).choices[0].message.content == "ok"


def test_after_repeated_crashes_it_is_given_up_and_says_so(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with served(folder, restarts=RestartPolicy(max_crashes=1)) as server:
        engine = server.engine
        assert isinstance(engine, EngineProcess)
        for _ in range(2):
            until(lambda: engine.healthy)
            assert engine.pid is not None
            os.kill(engine.pid, signal.SIGSEGV)
            until(lambda: not engine.healthy)
        until(lambda: not isinstance(engine.error, EngineCrashedError))
        health = patient.get(server.url + "/health")
        assert health.status_code == 503 and health.json()["status"] == "error"
        assert "killed by SIGSEGV; it has ended 2 times in a row and is not started again" in health.json()["error"]
        answer = patient.post(server.url + CHAT, json=BODY)
        assert answer.status_code == 503 and answer.headers["x-should-retry"] == "false"
        assert "is not started again" in caplog.text
        assert engine.pid is None


def test_pauses_double_and_a_sound_run_begins_a_new_row() -> None:
    policy = RestartPolicy(max_crashes=8)
    assert [policy.pause_after_crash(0.0) for _ in range(9)] == [0.5, 1, 2, 4, 8, 16, 30, 30, None]
    policy = RestartPolicy(max_crashes=1)
    assert [policy.pause_after_crash(served) for served in (1.0, 300.0, 400.0, 1.0)] == [0.5, 0.5, 0.5, None]


def test_a_model_that_cannot_be_loaded_again_is_given_up_with_its_error(folder: Path, tmp_path: Path) -> None:
    make = partial(loads_once, folder, tmp_path / "mark", {})
    with engine_of(make, restarts=RestartPolicy(max_crashes=1)) as engine:
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
        until(lambda: engine.error is not None and not isinstance(engine.error, EngineCrashedError))
        with pytest.raises(EngineError, match="cannot load the model again: the disk is gone; it has ended 2 times"):
            engine.check()


def test_a_failure_of_the_model_starts_the_engine_again(folder: Path) -> None:
    with engine_of(partial(scripted_llm, folder, {"fail": "the model broke"})) as engine:
        with pytest.raises(EngineCrashedError, match="the engine has failed: the model broke; it is started again"):
            run(collect(engine, [3, 4]))
        until(lambda: engine.healthy)


def test_answers_are_those_of_an_engine_in_the_same_process(folder: Path) -> None:
    params = SamplingParams(max_tokens=12, seed=3, logprobs=2, prompt_logprobs=False)
    with engine_of(partial(scripted_llm, folder, {"reply": "the cat sat on the mat"})) as engine:
        prompts = [[i + 2, 5] for i in range(20)]

        async def main() -> list[Any]:
            async def events(prompt: list[int]) -> list[Any]:
                return [event async for event in engine.stream_with_progress(prompt, params)]

            return await asyncio.gather(*map(events, prompts))

        streams = run(main())
        llm = scripted_llm(folder, {"reply": "the cat sat on the mat"})
        expected = llm.generate(prompts, params)
        for events, output in zip(streams, expected, strict=True):
            tokens = [event for event in events if hasattr(event, "token_ids")]
            assert [token for event in tokens for token in event.token_ids] == output.token_ids
            assert "".join(event.text for event in tokens) == output.text
            assert [value for event in tokens for value in event.logprobs] == output.logprobs
            assert [value for event in tokens for value in event.top_logprobs] == output.top_logprobs
            assert tokens[-1].finish_reason == output.finish_reason
            assert tokens[-1].timings.num_output_tokens == len(output.token_ids)
            assert events[0].num_prompt_tokens == 2, "progress comes first"
        until(lambda: engine.num_running == engine.num_waiting == 0)


def test_events_are_whole_after_packing() -> None:
    timings = Timings(1.0, 2.0, 3.0, 4, 5, 6, 7, 8)
    event = TokenEvent([1, 2], "ab", [-0.5], [((1, -0.5),)], "stop", 3, timings, [None], [()], 1)
    assert unpack(pack(event)) == event
    assert unpack(pack(TokenEvent([1], "", [], []))) == TokenEvent([1], "", [], [])
    progress = ProgressEvent(4, 3, 2, None, 1.0, 0.5)
    assert unpack(pack(progress)) == progress


def test_refusals_have_the_types_and_texts_of_the_engine(folder: Path) -> None:
    with engine_of(partial(scripted_llm, folder, FIELDS, max_num_seqs=1, max_num_waiting=1)) as engine:
        with pytest.raises(ValueError, match="the prompt is empty"):
            engine.stream([], SHORT)
        with pytest.raises(ValueError, match=r"token id 99999999999999999999 at position 1 is outside \[0, 299\]"):
            engine.stream([3, 99999999999999999999], SHORT)
        with pytest.raises(GrammarError, match="SamplingParams.regex cannot be compiled") as refused:
            engine.stream([3], SamplingParams(regex="("))
        assert refused.value.field == "regex" and refused.value.reason in str(refused.value)

        async def fill() -> None:
            running = engine.stream([4], SamplingParams(max_tokens=4000))
            await anext(running)
            waiting = engine.stream([5], SHORT)
            with pytest.raises(QueueFullError, match="the queue is full: 1 requests with 1 tokens are waiting"):
                engine.stream([6], SHORT)
            with pytest.raises(QueueFullError):
                engine.check_room()
            del waiting  # never iterated: its place is free again
            deadline = time.monotonic() + HANG
            while True:
                with contextlib.suppress(QueueFullError):
                    last = engine.stream([6], SHORT)
                    break
                assert time.monotonic() < deadline
                await asyncio.sleep(0.02)
            await last.aclose()
            await running.aclose()

        run(fill())
        until(lambda: engine.num_running == 0)


def test_a_request_that_is_not_begun_in_time_is_given_up(folder: Path) -> None:
    async def main(engine: EngineProcess) -> None:
        running = engine.stream([4], SamplingParams(max_tokens=4000))
        await anext(running)
        with pytest.raises(QueueTimeoutError, match="the request waited for 0.5 s and was not begun"):
            await collect(engine, [5])
        await running.aclose()

    fields = FIELDS | {"seconds_per_step": 0.05}
    with engine_of(partial(scripted_llm, folder, fields, max_num_seqs=1, max_queue_seconds=0.5)) as engine:
        run(main(engine))
        until(lambda: engine.num_running == engine.num_waiting == 0)
        assert engine.healthy and engine.num_restarts == 0


def test_a_constraint_has_a_deadline_and_others_do_not_wait_for_it(folder: Path) -> None:
    with engine_of(partial(slow_to_compile, folder, 5.0), compile_seconds=0.2) as engine:
        with pytest.raises(GrammarError, match="SamplingParams.regex cannot be compiled: it takes longer than 0.2 s"):
            engine.stream([3], SamplingParams(regex="a+"))
        assert run(collect(engine, [3, 4]))
        until(lambda: engine.num_running == engine.num_waiting == 0)


def test_a_closed_generator_stops_its_request(folder: Path) -> None:
    async def main(engine: EngineProcess) -> None:
        stream = engine.stream([4], SamplingParams(max_tokens=4000))
        await anext(stream)
        assert engine.num_running == 1
        await stream.aclose()

    with engine_of(partial(scripted_llm, folder, FIELDS)) as engine:
        run(main(engine))
        until(lambda: engine.num_running == 0)


@pytest.mark.parametrize(
    "error",
    [
        CheckpointError("a.safetensors", "3 tensors", "2", "head.weight"),
        CapacityError("flash needs 160 GB"),
        GrammarError("tools", "no"),
        FileNotFoundError(2, "No such file or directory", "/no"),
        EngineCrashedError("killed", 2.0),
    ],
)
def test_errors_cross_processes_with_type_text_and_attributes(error: BaseException) -> None:
    crossed = PortableError.of(error).error()
    assert type(crossed) is type(error) and str(crossed) == str(error) and vars(crossed) == vars(error)


def test_errors_of_loading_are_raised_where_the_engine_is_made(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError) as here:
        load_llm(tmp_path, None, EngineConfig())
    with pytest.raises(ValueError) as there:
        EngineProcess(partial(load_llm, tmp_path, None, EngineConfig()))
    assert type(there.value) is type(here.value) and str(there.value) == str(here.value)
    with pytest.raises(ChildProcessError, match="killed by SIGKILL; .*memory runs out, while it loaded the model"):
        EngineProcess(killed_while_it_loads)


def test_the_process_ends_with_the_engine_and_does_not_load_on(folder: Path) -> None:
    with engine_of(partial(scripted_llm, folder, {})) as engine:
        pid = engine.pid
        assert pid is not None and alive(pid)
    assert not alive(pid)
    with pytest.raises(EngineError, match="the engine is closed"):
        engine.stream([3], SHORT)
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr("dsv4.engine.process.client.Future", _Interrupted)
        EngineProcess(partial(slow_to_load, 10 * HANG))


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()] + [
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        if task.name != str(pid)
        for child in (task / "children").read_text().split()
    ]


def test_sigterm_to_the_whole_group_lets_open_answers_end() -> None:
    settings = {"reply": "</think>" + "word " * 20, "seconds_per_step": 0.02, "grace_seconds": 60.0}
    with process_serving(engine_process=True, **settings) as (process, url):
        (engine,) = children(process.pid)
        reader = Reader(url, CHAT)
        assert reader.begun.wait(HANG)
        os.kill(engine, signal.SIGTERM)
        os.kill(engine, signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        assert reader.wait().endswith("data: [DONE]\n\n")
        assert process.wait(HANG) == 0 and not alive(engine)


def test_a_long_step_delays_neither_the_shutdown_nor_the_end_of_the_engine() -> None:
    settings = {"seconds_of_prefill": 300.0, "grace_seconds": 0.5, **NO_KEEP_ALIVE}
    with process_serving(engine_process=True, **settings) as (process, url):
        (engine,) = children(process.pid)
        reader = Reader(url, CHAT)
        until(lambda: patient.get(url + "/health").json()["running"] == 1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(HANG) == 0
        reader.wait()
        assert reader.status == 503
        until(lambda: not alive(engine))


def test_the_engine_dies_with_a_killed_server() -> None:
    with process_serving(engine_process=True, seconds_of_prefill=300.0) as (process, url):
        (engine,) = children(process.pid)
        Reader(url, CHAT)
        until(lambda: patient.get(url + "/health").json()["running"] == 1)
        process.kill()
        until(lambda: not alive(engine))


class _Interrupted:
    """A future under whose wait Ctrl-C is pressed."""

    def done(self) -> bool:
        return False

    def set_exception(self, error: BaseException) -> None: ...

    def result(self) -> None:
        time.sleep(0.2)
        raise KeyboardInterrupt


def test_a_constraint_has_a_deadline_in_an_engine_of_this_process_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    compile_now = GrammarCompiler.compile

    def compile_later(self: GrammarCompiler, params: SamplingParams) -> object:
        released.wait(HANG)
        return compile_now(self, params)

    engine = AsyncEngine(scripted_llm(folder, {}), compile_seconds=0.2)
    try:
        with monkeypatch.context() as slow:
            slow.setattr(GrammarCompiler, "compile", compile_later)
            with pytest.raises(GrammarError, match="regex cannot be compiled: it takes longer than 0.2 s"):
                engine.stream([3], SamplingParams(regex="a+"))
            released.set()
        with pytest.raises(GrammarError, match="regex cannot be compiled"):
            engine.stream([3], SamplingParams(regex="a("))
        assert run(collect(engine, [3, 4]))
    finally:
        released.set()
        engine.close()


def test_a_lasting_error_does_not_gather_frames(folder: Path) -> None:
    with engine_of(partial(scripted_llm, folder, {}), restarts=RestartPolicy(max_crashes=0)) as engine:
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
        until(lambda: engine.error is not None)
        for _ in range(20):
            with pytest.raises(EngineError, match="is not started again"):
                engine.check()
        assert len(list(traceback.walk_tb(cast(BaseException, engine.error).__traceback__))) <= 3


def test_cancelled_traces_stop_in_the_process_too(folder: Path) -> None:
    """One that runs and one that waits for it."""

    async def trace_after_others(engine: EngineProcess) -> int:
        others = [asyncio.create_task(engine.trace([1, 2])) for _ in range(2)]
        await asyncio.sleep(0.2)
        for other in others:
            other.cancel()
        await asyncio.wait(others)
        assert all(other.cancelled() for other in others)
        return (await asyncio.wait_for(engine.trace([1]), HANG / 2)).position

    with engine_of(partial(endless_to_trace, folder)) as engine:
        assert run(trace_after_others(engine)) == 0
