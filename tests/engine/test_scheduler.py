"""Scheduling of random arrivals: decoding requests never wait, none starves, short prompts start soon."""

from __future__ import annotations

import asyncio
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4.engine import LLM, AsyncEngine, SamplingParams
from dsv4.engine.config import EngineConfig
from dsv4.engine.scheduler import reading_order

from .simulation import Arrival, Simulation


@st.composite
def any_config(draw: st.DrawFn) -> EngineConfig:
    rows = draw(st.integers(1, 8))
    partial = draw(st.one_of(st.none(), st.integers(1, rows)))
    return EngineConfig(
        max_num_seqs=rows,
        max_num_batched_tokens=draw(st.integers(rows, 64)),
        max_num_partial_prefills=partial,
        time_slice=draw(st.integers(1, 20)),
        enable_prefix_caching=False,
    )


def plain_config(**options: int) -> EngineConfig:
    return EngineConfig(enable_prefix_caching=False, **options)


any_arrivals = st.lists(
    st.builds(Arrival, st.integers(0, 60), st.one_of(st.integers(1, 12), st.integers(1, 400)), st.integers(1, 9)),
    min_size=1,
    max_size=25,
)


@given(any_config(), any_arrivals)
@settings(deadline=None, max_examples=300)
def test_every_request_ends_whatever_arrives(config: EngineConfig, arrivals: list[Arrival]) -> None:
    work = sum(2 * arrival.prompt + arrival.output + 1 for arrival in arrivals)
    simulation = Simulation(config, arrivals).run(60 + work)
    assert len(simulation.first_token) == len(arrivals)


@given(
    rows=st.integers(2, 8),
    long=st.lists(st.builds(Arrival, st.integers(0, 9), st.integers(1000, 4000), st.just(1)), min_size=1, max_size=12),
    short=st.lists(st.builds(Arrival, st.integers(10, 40), st.integers(1, 30), st.just(1)), min_size=1, max_size=4),
)
@settings(deadline=None, max_examples=100)
def test_a_short_prompt_has_its_token_at_once_whatever_is_being_read(
    rows: int, long: list[Arrival], short: list[Arrival]
) -> None:
    """Up to twelve long prompts, more than there are slots, and four short ones that together fit half a step."""
    simulation = Simulation(plain_config(max_num_seqs=rows, max_num_batched_tokens=256), [*long, *short]).run(2000)
    taken = [simulation.first_token[i] for i, a in enumerate(simulation.arrivals) if a.prompt <= 30]
    # One step, or two if the oldest prompt has just been prefilled; with two slots they take the free one in turn.
    assert max(taken) <= 1 + len(short)


@given(st.integers(2, 8), st.integers(1, 60), st.integers(1, 30))
@settings(deadline=None, max_examples=30)
def test_a_stream_of_short_prompts_does_not_starve_a_long_one(rows: int, size: int, output: int) -> None:
    """Five short requests per step: the long prompt still gets half of the tokens that decoding leaves."""
    budget, long = 128, 2000
    steps = math.ceil(long / ((budget - rows) // 2)) + 1
    short = [Arrival(step, size, output) for step in range(1, steps + 1) for _ in range(5)]
    Simulation(plain_config(max_num_seqs=rows, max_num_batched_tokens=budget), [Arrival(0, long, 1), *short]).run(
        steps, until=0
    )


def test_shorter_prompts_overtake_and_nearly_equal_ones_wait() -> None:
    def order(*unread: int) -> list[int]:
        return [place for place, _ in reading_order(unread, 100)]

    assert list(reading_order([1000], 101)) == [(0, 51), (0, 1000)]
    assert order(1000, 400, 20) == [0, 2, 1, 0, 1, 2], "the shortest overtakes first"
    assert order(1000, 501, 1000) == [0, 0, 1, 2], "what is nearly as long waits its turn"
    assert order(10, 5, 6) == [0, 1, 0, 1, 2]


def test_two_long_prompts_are_read_one_after_the_other() -> None:
    """Prefilling both at once would finish both late."""
    arrivals = [Arrival(0, 1000, 1), Arrival(0, 1000, 1)]
    simulation = Simulation(plain_config(max_num_seqs=4, max_num_batched_tokens=100), arrivals).run(50)
    assert simulation.first_token == {0: 10, 1: 20}


@pytest.mark.parametrize("partial", [0, 5])
def test_partial_prefills_out_of_range_are_refused(partial: int) -> None:
    with pytest.raises(ValueError, match=rf"max_num_partial_prefills is {partial}; allowed: \[1, 4\]"):
        EngineConfig(max_num_seqs=4, max_num_partial_prefills=partial)


def test_a_short_request_is_answered_while_long_ones_are_read(model) -> None:
    """End to end: three long prompts, a short question after them, in an engine with two slots."""
    long = SamplingParams(max_tokens=1, ignore_eos=True)

    async def main(engine: AsyncEngine) -> tuple[list[int], list[int]]:
        async def ask(name: int, prompt: list[int], params: SamplingParams) -> None:
            async for _ in engine.stream(prompt, params):
                pass
            ended.append(name)

        ended: list[int] = []
        reading = [asyncio.create_task(ask(i, [5 + i] * 700, long)) for i in range(3)]
        while not model.batches:
            await asyncio.sleep(0.001)
        before = len(model.batches)
        await ask(9, [4, 8], SamplingParams(max_tokens=5, ignore_eos=True))
        steps = len(model.batches) - before
        await asyncio.gather(*reading)
        return ended, [steps]

    model.seconds_per_step = 0.02
    engine = AsyncEngine(LLM(model, max_num_seqs=2, max_num_batched_tokens=32))
    try:
        with ThreadPoolExecutor(1) as pool:  # other tests may leave an event loop running in this thread
            ended, (steps,) = pool.submit(asyncio.run, main(engine)).result()
    finally:
        engine.close()
    assert ended == [9, 0, 1, 2]
    assert steps < 40, "five tokens, and the steps that go by while this process is kept waiting"
