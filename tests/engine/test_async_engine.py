import asyncio
import contextlib
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from dsv4.engine import LLM, AsyncEngine, EngineError, SamplingParams

PARAMS = SamplingParams(seed=2, max_tokens=15, ignore_eos=True)
ENDLESS = SamplingParams(seed=2, max_tokens=4000, ignore_eos=True)


def run(work):
    """asyncio.run in a separate thread: other tests may leave an event loop running in this one."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


@contextlib.contextmanager
def running(model, **limits):
    engine = AsyncEngine(LLM(model, **limits))
    try:
        yield engine
    finally:
        engine.close()


async def collect(engine: AsyncEngine, prompt: list[int], params: SamplingParams = PARAMS) -> list[int]:
    return [token async for event in engine.stream(prompt, params) for token in event.token_ids]


async def until(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.002)


def test_many_requests_at_a_time_each_get_their_own_tokens(model) -> None:
    expected = [LLM(model).generate([[i + 2, 3]], PARAMS)[0].token_ids for i in range(20)]

    async def main(engine: AsyncEngine) -> list[list[int]]:
        return await asyncio.gather(*(collect(engine, [i + 2, 3]) for i in range(20)))

    with running(model, max_num_seqs=3) as engine:
        assert run(main(engine)) == expected
        assert engine.num_running == engine.num_waiting == 0


def test_closing_the_generator_stops_the_request_at_once(model) -> None:
    async def main(engine: AsyncEngine) -> None:
        stream = engine.stream([4, 5], ENDLESS)
        await anext(stream)
        assert engine.num_running == 1
        await stream.aclose()
        await until(lambda: engine.num_running == 0)
        steps = len(model.batches)
        await asyncio.sleep(0.05)
        assert len(model.batches) == steps, "a ghost request is still being computed"

    model.seconds_per_step = 0.001
    with running(model) as engine:
        run(main(engine))
        assert model.cache.lengths == [0] * 8


def test_a_cancelled_task_stops_its_request_even_while_it_waits_in_the_queue(model) -> None:
    async def main(engine: AsyncEngine) -> None:
        first = asyncio.create_task(collect(engine, [4], ENDLESS))
        await until(lambda: engine.num_running == 1)
        second = asyncio.create_task(collect(engine, [5], ENDLESS))
        await until(lambda: engine.num_waiting == 1)
        second.cancel()
        await until(lambda: engine.num_waiting == 0)
        first.cancel()
        await until(lambda: engine.num_running == 0)

    model.seconds_per_step = 0.001
    with running(model, max_num_seqs=1) as engine:
        run(main(engine))


def test_an_abort_does_not_disturb_the_others(model) -> None:
    expected = LLM(model).generate([[7, 7]], PARAMS)[0].token_ids

    async def main(engine: AsyncEngine) -> list[int]:
        doomed = asyncio.create_task(collect(engine, [4], ENDLESS))
        await until(lambda: engine.num_running == 1)
        kept = asyncio.create_task(collect(engine, [7, 7]))
        await until(lambda: engine.num_running == 2)
        doomed.cancel()
        return await kept

    model.seconds_per_step = 0.02  # both run long enough to be seen
    with running(model) as engine:
        assert run(main(engine)) == expected


def test_a_bad_prompt_is_refused_before_it_is_queued(model) -> None:
    with running(model) as engine, pytest.raises(ValueError, match="the prompt is empty"):
        engine.stream([], PARAMS)


def test_a_failing_model_reaches_every_waiting_request_the_health_and_the_log(model, caplog) -> None:
    async def main(engine: AsyncEngine) -> list[object]:
        return await asyncio.gather(*(collect(engine, [i + 2]) for i in range(5)), return_exceptions=True)

    model.fail_at_step = 3
    with running(model, max_num_seqs=2) as engine:
        errors = run(main(engine))
        assert all(isinstance(error, EngineError) and "the model broke" in str(error) for error in errors)
        assert not engine.healthy
        with pytest.raises(EngineError, match="the model broke"):
            run(collect(engine, [3]))
    assert "the engine has stopped: " in caplog.text


def test_closing_the_engine_ends_its_requests_with_an_error(model) -> None:
    async def main(engine: AsyncEngine) -> None:
        task = asyncio.create_task(collect(engine, [4], ENDLESS))
        await until(lambda: engine.num_running == 1)
        await asyncio.to_thread(engine.close)
        with pytest.raises(EngineError, match="closed"):
            await task

    model.seconds_per_step = 0.001
    llm = LLM(model)
    engine = AsyncEngine(llm)
    run(main(engine))
    assert not engine.healthy
    assert not llm.core.has_work and model.cache.lengths == [0] * 8, "the LLM would go on with the engine's requests"
    engine.close()
    assert len(llm.generate([[3]], PARAMS)[0].token_ids) == 15


def test_a_client_whose_loop_is_gone_does_not_stop_the_engine(model) -> None:
    async def leave(engine: AsyncEngine) -> None:
        stream = engine.stream([4], ENDLESS)
        await anext(stream)
        abandoned.append(stream)

    abandoned: list[object] = []
    model.seconds_per_step = 0.001
    with running(model) as engine:
        run(leave(engine))
        assert run(collect(engine, [5])) == LLM(model).generate([[5]], PARAMS)[0].token_ids


def test_the_llm_refuses_calls_while_the_engine_owns_it(model) -> None:
    llm = LLM(model)
    engine = AsyncEngine(llm)
    with pytest.raises(RuntimeError, match="busy"):
        llm.generate([[3]], PARAMS)
    engine.close()
    assert len(llm.generate([[3]], PARAMS)[0].token_ids) == 15
