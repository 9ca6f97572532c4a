"""An engine process that does not move is killed; a prompt that crashed it twice is refused."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from dsv4.engine import AsyncEngine, EngineError, SamplingParams
from dsv4.engine.cluster.replica import standstill
from dsv4.engine.errors import EngineCrashedError, PromptRefusedError, QueueTimeoutError
from dsv4.engine.process.client import EngineProcess
from dsv4.engine.process.messages import pack_tokens
from dsv4.engine.process.restarts import RestartPolicy
from dsv4.engine.process.suspects import Suspects, prompt_hash
from dsv4.engine.process.watchdog import Activity, StuckWatch

from .conftest import serving
from .scripted_engine import dies_of, scripted_llm
from .scripted_model import ScriptedModel
from .test_engine_process import CHAT, FIELDS, HANG, LONG, SHORT, alive, collect, engine_of, run, until

FATAL = "doom"


def freeze(pid: int) -> None:
    """Stops a process; returns once none of its threads runs any more."""
    os.kill(pid, signal.SIGSTOP)
    tasks = Path(f"/proc/{pid}/task")
    until(lambda: all((task / "stat").read_text().rpartition(")")[2].split()[0] == "T" for task in tasks.iterdir()))


def ask(url: str, text: str, **fields: Any) -> httpx.Response:
    body = {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 400}
    return httpx.post(url + CHAT, json=body | fields, timeout=HANG)


def tokens_of(folder: Path, text: str) -> list[int]:
    return ScriptedModel(folder).tokenizer.encode(text)


def test_a_step_that_never_ends_is_a_crash(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    make = partial(scripted_llm, folder, {"seconds_of_prefill": 10 * HANG})
    with engine_of(make, stuck_seconds=4.0) as engine:
        first = engine.pid
        assert first is not None
        words = "took no step for 4 s with 1 requests open and was killed; it is started again"
        with pytest.raises(EngineCrashedError, match=words):
            run(collect(engine, [3, 4]))
        until(lambda: engine.healthy)
        assert engine.pid != first and not alive(first) and engine.num_restarts == 1
    assert words in caplog.text


def test_a_process_that_hears_nothing_is_a_crash(folder: Path) -> None:
    """Stopped before a request is sent: the caller waits for its validation."""
    with engine_of(partial(scripted_llm, folder, {}), stuck_seconds=4.0) as engine:
        assert engine.pid is not None
        freeze(engine.pid)
        with pytest.raises(EngineError, match="sent nothing for 4 s with 1 calls open and was killed"):
            engine.stream([3, 4], SHORT)
        until(lambda: engine.healthy)
        assert run(collect(engine, [3, 4]))


def test_a_process_that_hears_nothing_does_not_hold_up_the_end(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("dsv4.engine.process.client.CLOSE_SECONDS", 0.5)
    with engine_of(partial(scripted_llm, folder, {})) as engine:
        pid = engine.pid
        assert pid is not None
        freeze(pid)
        closing = threading.Thread(target=engine.close, daemon=True)
        closing.start()
        closing.join(HANG)
        ended = not closing.is_alive()
        if not ended:
            os.kill(pid, signal.SIGCONT)  # else the end of this test would wait too
        assert ended and not alive(pid)
    assert "did not end within 0.5 s and is killed" in caplog.text


class PatientWatch(StuckWatch):
    """Looks at a process with work when it has moved, so that a busy machine is no standstill; `looks`: what it saw."""

    looks: list[Activity]

    def verdict(self, process: Any, now: Activity) -> str | None:
        while not self._has_moved(now):
            time.sleep(0.01)
            now = process.activity
        self.looks.append(now)
        return super().verdict(process, now)

    def _has_moved(self, now: Activity) -> bool:
        stepped = not now.num_requests or now.num_steps != self._last.num_steps
        return stepped and (not now.num_calls or now.num_messages != self._last.num_messages)


def test_an_engine_that_moves_or_rests_is_left_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = list[Activity]()
    monkeypatch.setattr(PatientWatch, "looks", looks, raising=False)
    monkeypatch.setattr("dsv4.engine.process.client.StuckWatch", PatientWatch)

    async def work(engine: EngineProcess) -> None:
        stream = engine.stream([3, 4], SamplingParams(max_tokens=len(LONG)))
        while sum(look.num_requests for look in looks) < 20:
            await anext(stream)
        await stream.aclose()

    with engine_of(partial(scripted_llm, folder, FIELDS), stuck_seconds=0.8) as engine:
        run(work(engine))
        until(lambda: len(looks) > 20 and not any(look.num_requests for look in looks[-20:]))
        assert engine.num_restarts == 0


def test_only_time_with_work_and_without_a_step_counts() -> None:
    watch, first, second = StuckWatch(4.0), object(), object()
    idle, busy = Activity(5, 9, 0, 0), Activity(5, 9, 2, 0)
    assert watch.interval == 0.5
    assert [watch.verdict(first, idle) for _ in range(20)] == [None] * 20
    assert [watch.verdict(first, busy) for _ in range(8)] == [None] * 8
    assert watch.verdict(second, busy) is None, "another process starts from zero"
    assert [watch.verdict(second, busy) for _ in range(7)] == [None] * 7
    assert watch.verdict(second, busy) == "took no step for 4 s with 2 requests open"
    assert watch.verdict(second, Activity(6, 10, 2, 0)) is None
    calls = [watch.verdict(second, Activity(6, 10, 0, 1)) for _ in range(9)]
    assert calls[-1] == "sent nothing for 4 s with 1 calls open" and set(calls[:7]) == {None}


def test_a_prompt_that_crashed_the_engine_twice_is_refused(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    engine = EngineProcess(
        partial(dies_of, folder, tokens_of(folder, FATAL), {}), restarts=RestartPolicy(max_crashes=2)
    )
    with serving(engine) as server:  # type: ignore[arg-type]
        for _ in range(2):
            crashed = ask(server.url, FATAL)
            assert crashed.status_code == 503 and "SIGSEGV" in crashed.json()["error"]["message"]
            until(lambda: engine.healthy)
        before = engine.pid
        for fields in ({}, {"stream": True}, {"max_tokens": 9}):
            refused = ask(server.url, FATAL, **fields)
            error = refused.json()["error"]
            assert refused.status_code == 400 and error["type"] == "invalid_request_error", refused.text
            assert "has crashed the engine twice and is not computed again" in error["message"]
            assert refused.headers["x-should-retry"] == "false"
        assert ask(server.url, "harmless").status_code == 200
        assert engine.pid == before and engine.num_restarts == 2
    assert "has crashed the engine twice; it is refused from now on" in caplog.text and FATAL not in caplog.text


def test_those_that_were_beside_it_are_answered(folder: Path) -> None:
    """One is fatal only as its answer grows: the others get past the place where they were at the crash."""
    reply = "abcdefghijklmnop" * 3
    fatal, harmless = tokens_of(folder, "the mat"), [tokens_of(folder, f"cat {i}") for i in range(5)]
    end = [*fatal, *tokens_of(folder, reply)[:6]]
    make = partial(dies_of, folder, end, {"reply": reply, "seconds_per_step": 0.05})
    params = SamplingParams(max_tokens=30)

    async def answer(engine: EngineProcess, prompt: list[int]) -> int:
        """Number of tokens, asked for again after each crash; -1 for a refusal."""
        for _ in range(20):
            try:
                return len([token async for event in engine.stream(prompt, params) for token in event.token_ids])
            except EngineCrashedError:
                while not engine.healthy:
                    await asyncio.sleep(0.05)
            except PromptRefusedError:
                return -1
        raise AssertionError("it crashed again and again")

    async def everybody(engine: EngineProcess) -> list[int]:
        others = [asyncio.create_task(answer(engine, prompt)) for prompt in harmless]
        while engine.num_running < len(harmless):
            await asyncio.sleep(0.01)
        return await asyncio.gather(answer(engine, fatal), *others)

    with engine_of(make, restarts=RestartPolicy(max_crashes=3)) as engine:
        counts = run(everybody(engine))
        assert counts == [-1, *[30] * len(harmless)] and engine.num_restarts == 2


def test_suspects_take_turns_and_whoever_leaves_makes_way() -> None:
    async def main() -> None:
        suspects = Suspects()
        async with suspects.flight("a"), suspects.flight("b"), suspects.flight("c") as third:
            third.count(5, ended=False)
            suspects.blame()
        first, second, last = suspects.flight("a"), suspects.flight("b"), suspects.flight("c")
        on_trial = await first.__aenter__()
        waiting = [asyncio.create_task(other.__aenter__()) for other in (second, last)]
        async with suspects.flight("unknown"):
            await asyncio.sleep(0.05)
        assert not any(task.done() for task in waiting)
        waiting[0].cancel()
        on_trial.count(1, ended=False)  # it was at 0 tokens: cleared
        flight = await asyncio.wait_for(waiting[1], HANG)
        flight.count(5, ended=False)
        assert flight.on_cleared is not None, "as far as at the crash, not past it"
        suspects.blame()
        with pytest.raises(PromptRefusedError, match="hash c"):
            suspects.check("c")
        suspects.check("a"), suspects.check("b")
        async with suspects.flight("b") as again:
            assert again.on_cleared is not None, "still a suspect"
            again.count(0, ended=True)
        async with suspects.flight("b") as again:
            assert again.on_cleared is None

    run(main())


def test_who_is_twice_alone_at_a_crash_is_refused_wherever_it_was() -> None:
    async def main() -> None:
        suspects = Suspects()
        for tokens in (5, 9):
            async with suspects.flight("a") as flight, suspects.flight("ended") as other:
                other.count(1, ended=True)
                flight.count(tokens, ended=False)
                assert flight.on_cleared is None, "past the place of the crash"
                suspects.blame()
        with pytest.raises(PromptRefusedError, match="hash a"):
            suspects.check("a")

    run(main())


def test_an_answer_that_is_only_read_slowly_is_no_work_and_no_suspect(folder: Path) -> None:
    async def main(engine: EngineProcess) -> None:
        stream = engine.stream([3, 4], SHORT)
        await anext(stream)
        while engine.num_running:
            await asyncio.sleep(0.01)
        await asyncio.sleep(6.0)  # the client reads nothing
        assert engine.num_restarts == 0 and engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
        while not engine.num_restarts:
            await asyncio.sleep(0.01)
        assert [event async for event in stream][-1].finish_reason is not None
        while not engine.healthy:
            await asyncio.sleep(0.01)
        async with engine._suspects.flight(prompt_hash(pack_tokens([3, 4]))) as flight:
            assert flight.on_cleared is None

    with engine_of(partial(scripted_llm, folder, {"reply": LONG}), stuck_seconds=4.0) as engine:
        run(main(engine))


def test_hashes_tell_prompts_apart() -> None:
    assert prompt_hash([1, 2]) != prompt_hash([12]) and prompt_hash([1, 2]) == prompt_hash([1, 2])


def test_a_suspect_does_not_wait_for_its_trial_for_ever() -> None:
    async def main() -> None:
        suspects = Suspects()
        async with suspects.flight("a"), suspects.flight("b"):
            suspects.blame()
        async with suspects.flight("a", 0.05):
            with pytest.raises(QueueTimeoutError, match="the request waited for 0.05 s and was not begun"):
                await suspects.flight("b", 0.05).__aenter__()
            await asyncio.sleep(0.1)  # the limit is one of waiting only
        async with suspects.flight("b", 0.05) as flight:
            assert flight.on_cleared is not None

    run(main())


def test_an_engine_of_a_replica_that_stands_still_is_told(folder: Path) -> None:
    """The replica then ends its process, and Ray starts another."""
    moves = threading.Event()
    engine = AsyncEngine(scripted_llm(folder, {"held": moves}))
    request = engine.reserve([3, 4], SHORT)
    engine.start(request, Nobody(), watched=False)
    verdict = standstill(engine, StuckWatch(0.4))
    moves.set()
    assert verdict == "took no step for 0.4 s with 1 requests open"
    engine.close()
    assert standstill(engine, StuckWatch(0.4)) is None and standstill(engine, None) is None


class Nobody:
    def send(self, item: object) -> None: ...
