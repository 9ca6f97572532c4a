"""The queue is bounded in requests and tokens; a place is freed whatever becomes of its request."""

import asyncio
import gc
from concurrent.futures import ThreadPoolExecutor

import pytest

from dsv4.engine import LLM, AsyncEngine, QueueFullError, SamplingParams
from dsv4.engine.config import EngineConfig
from dsv4.engine.request import Request, RequestStatus
from dsv4.engine.waiting import WaitingRoom

PARAMS = SamplingParams(max_tokens=2, ignore_eos=True)


def request(tokens: int) -> Request:
    return Request(1, [5] * tokens, PARAMS, 0, frozenset(), 100)


def test_requests_are_bounded() -> None:
    room = WaitingRoom(EngineConfig(max_num_waiting=2))
    held = [request(3), request(4)]
    for one in held:
        room.add(one)
    words = "the queue is full: 2 requests with 7 tokens are waiting, allowed are 2 requests with 4194304 tokens"
    with pytest.raises(QueueFullError, match=words + "; this one has 5 tokens"):
        room.add(request(5))
    with pytest.raises(QueueFullError, match=words):
        room.check()


def test_tokens_are_bounded_and_a_lone_prompt_is_taken() -> None:
    room = WaitingRoom(EngineConfig(max_waiting_tokens=10))
    long = request(50)
    room.add(long)
    with pytest.raises(QueueFullError, match="1 requests with 50 tokens"):
        room.add(request(1))
    long.status = RequestStatus.RUNNING
    held = [request(4), request(6)]
    for one in held:
        room.add(one)
    with pytest.raises(QueueFullError):
        room.check()


@pytest.mark.parametrize("status", [RequestStatus.RUNNING, RequestStatus.FINISHED, None])
def test_a_place_is_free_when_its_request_runs_has_ended_or_is_gone(status: RequestStatus | None) -> None:
    room = WaitingRoom(EngineConfig(max_num_waiting=1))
    held = [request(3)]
    room.add(held[0])
    with pytest.raises(QueueFullError):
        room.check()
    if status is None:
        held.clear()
        gc.collect()
    else:
        held[0].status = status
    room.check()


@pytest.mark.parametrize("limits", [{"max_num_waiting": 0}, {"max_waiting_tokens": 0}])
def test_limits_below_one_are_refused(model, limits: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(limits))} is 0; allowed: 1 or more"):
        LLM(model, **limits)


def test_two_thousand_at_once_are_not_all_taken(model) -> None:
    async def main(engine: AsyncEngine) -> tuple[int, int]:
        async def ask() -> bool:
            try:
                return len([event async for event in engine.stream([4, 5], PARAMS)]) == 2
            except QueueFullError:
                return False

        first = await asyncio.gather(*(ask() for _ in range(2000)))
        again = await asyncio.gather(*(ask() for _ in range(50)))
        return sum(first), sum(again)

    model.seconds_per_step = 0.05
    engine = AsyncEngine(LLM(model, max_num_waiting=50))
    try:
        with ThreadPoolExecutor(1) as pool:  # other tests may leave an event loop running in this thread
            first, again = pool.submit(asyncio.run, main(engine)).result()
    finally:
        engine.close()
    assert 50 <= first < 1500, "50 wait; a few more come while they begin to run"
    assert again == 50, "the places are free again"


def test_generate_takes_any_number(model) -> None:
    outputs = LLM(model, max_num_waiting=1).generate([[4, 5]] * 20, PARAMS)
    assert {output.finish_reason for output in outputs} == {"length"}
