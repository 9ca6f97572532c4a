"""Progress events and timings of a request, by the engine's clock."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing

import pytest

from dsv4.engine import LLM, AsyncEngine, ProgressEvent, SamplingParams, TokenEvent
from dsv4.engine.progress import REPORT_SECONDS, ProgressWatch
from dsv4.engine.request import Request

FEW = SamplingParams(seed=2, max_tokens=4, ignore_eos=True)
ENDLESS = SamplingParams(seed=2, max_tokens=4000, ignore_eos=True)
PROMPT = [2 + i % 40 for i in range(64)]


def run(model, work, **limits):
    """Runs work(engine) with asyncio in a separate thread."""
    engine = AsyncEngine(LLM(model, **limits))
    try:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(asyncio.run, work(engine)).result()
    finally:
        engine.close()


async def collect(engine, prompt, params=FEW):
    return [event async for event in engine.stream_with_progress(prompt, params)]


async def until(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.002)


def new_request(number: int) -> Request:
    return Request(number, list(PROMPT), FEW, 0, frozenset(), 4096)


def test_progress_comes_before_the_tokens_and_ends_with_the_whole_prompt(model, monkeypatch) -> None:
    monkeypatch.setattr("dsv4.engine.progress.REPORT_SECONDS", 0.0)  # a report after every step
    model.seconds_per_step = 0.01
    events = run(model, lambda engine: collect(engine, PROMPT), max_num_seqs=2, max_num_batched_tokens=16)
    progress = [event for event in events if isinstance(event, ProgressEvent)]
    assert events[: len(progress)] == progress, "nothing is reported once the answer has begun"
    assert [event.num_computed_tokens for event in progress] == [0, 16, 32, 48, 64]
    assert [event.queue_position for event in progress] == [0, None, None, None, None]
    assert {event.num_prompt_tokens for event in progress} == {64}
    seconds = [event.prefill_seconds for event in progress]
    assert seconds == sorted(seconds) and seconds[-1] >= 4 * 0.01
    assert len([event for event in events if isinstance(event, TokenEvent)]) == 4


def test_timings_are_of_the_steps_themselves(model) -> None:
    model.seconds_per_step = 0.02

    async def main(engine: AsyncEngine) -> list[TokenEvent]:
        busy = asyncio.create_task(collect(engine, [4], SamplingParams(seed=1, max_tokens=60, ignore_eos=True)))
        await until(lambda: engine.num_running == 1)
        events = [event async for event in engine.stream(PROMPT, FEW)]
        await asyncio.sleep(0.2)  # a slow reader does not change the timings
        await busy
        return events

    events = run(model, main, max_num_seqs=1, max_num_batched_tokens=16)
    timings = [event.timings for event in events]
    assert [t.num_output_tokens for t in timings] == [1, 2, 3, 4]
    last = timings[-1]
    assert (last.num_prompt_tokens, last.num_cached_tokens) == (64, 0)
    assert last.queue_seconds >= 0.02  # it waited for the other
    assert last.prefill_seconds >= 4 * 0.02 and {t.prefill_seconds for t in timings} == {last.prefill_seconds}
    assert timings[0].decode_seconds == 0.0 and last.decode_seconds >= 3 * 0.02


def test_generate_gives_timings_too(model) -> None:
    output = LLM(model).generate([PROMPT], FEW)[0]
    assert output.timings.num_output_tokens == 4 and output.timings.prefill_seconds > 0


def test_place_in_the_queue_is_told_at_once_and_as_it_changes(model, monkeypatch) -> None:
    monkeypatch.setattr("dsv4.engine.progress.REPORT_SECONDS", 0.0)
    model.seconds_per_step = 0.002
    short = SamplingParams(seed=2, max_tokens=200, ignore_eos=True)

    async def main(engine: AsyncEngine) -> list[int | None]:
        first = asyncio.create_task(collect(engine, [4], short))
        await until(lambda: engine.num_running == 1)
        second = asyncio.create_task(collect(engine, [5], short))
        await until(lambda: engine.num_waiting == 1)
        events = await collect(engine, [6])
        await asyncio.gather(first, second)
        return [event.queue_position for event in events if isinstance(event, ProgressEvent)]

    places = run(model, main, max_num_seqs=1)
    assert places[0] == 1 and places[-1] is None
    told = [place for at, place in enumerate(places) if place != (places[at - 1] if at else -1)]
    assert told == [1, 0, None], "first one ahead, then none, then it runs"


@pytest.mark.parametrize("place", ["queue", "prompt"])
def test_leaving_while_progress_is_told_stops_the_request_at_once(model, monkeypatch, place: str) -> None:
    monkeypatch.setattr("dsv4.engine.progress.REPORT_SECONDS", 0.0)
    model.seconds_per_step = 0.005

    async def main(engine: AsyncEngine) -> None:
        other = None
        if place == "queue":
            other = asyncio.create_task(collect(engine, [4], ENDLESS))
            await until(lambda: engine.num_running == 1)
        async with aclosing(engine.stream_with_progress(PROMPT * 20, FEW)) as events:
            await anext(events)
            event = await anext(events)
            assert isinstance(event, ProgressEvent) and (event.queue_position is None) is (place == "prompt")
        if other is None:
            await until(lambda: engine.num_running == 0)
            assert model.cache.lengths == [0], "the row is empty again"
        else:
            await until(lambda: engine.num_waiting == 0)
            other.cancel()

    run(model, main, max_num_seqs=1, max_num_batched_tokens=16)


def test_reports_are_bounded_in_time_but_the_last_one_is_never_left_out() -> None:
    watch, requests = ProgressWatch(), [new_request(i) for i in range(3)]
    assert watch.reports(requests, 0.0) == []
    for request in requests:
        watch.add(request)
    clock = 100.0
    assert [event.queue_position for _, event in watch.reports(requests, clock)] == [0, 1, 2]
    running = requests[0]
    running.scheduled_time = clock
    reports = []
    for step in range(1, 101):
        running.num_computed_tokens = min(step, 63)
        reports += watch.reports(requests[1:], clock + step * REPORT_SECONDS / 10)
    assert len([1 for request, _ in reports if request is running]) <= 10
    assert len([1 for request, _ in reports if request is not running]) == 2, "what has not changed is not told"
    running.num_computed_tokens, running.first_token_time = 64, clock + 30
    last = watch.reports(requests[1:], clock + 10 * REPORT_SECONDS + 1e-6)
    assert [(request, event.num_computed_tokens) for request, event in last] == [(running, 64)]
    watch.discard(requests[1])
    watch.discard(requests[2])
    assert watch.reports([], clock + 100) == []
