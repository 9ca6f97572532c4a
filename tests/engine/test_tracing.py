"""Traces of an AsyncEngine, beside requests that run."""

import asyncio
from pathlib import Path

import pytest

from dsv4.engine import LLM, AsyncEngine, EngineError, SamplingParams
from dsv4.engine.tracing import STEP_TOKENS
from tests.model.tiny import random_ids, random_model, tiny_config

PARAMS = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)


def new_llm() -> LLM:
    return LLM(random_model(tiny_config(vocab_size=64)), max_num_seqs=2, max_model_len=1024)


async def tokens_of(engine: AsyncEngine, prompt: list[int]) -> list[int]:
    return [token for event in [e async for e in engine.stream(prompt, PARAMS)] for token in event.token_ids]


def test_a_trace_agrees_with_the_answer_and_changes_nothing_of_it() -> None:
    prompt = random_ids(tiny_config(vocab_size=64), STEP_TOKENS + 70).tolist()
    alone = new_llm().generate([prompt], PARAMS)[0].token_ids

    async def run() -> None:
        engine = AsyncEngine(new_llm())
        try:
            answer = asyncio.create_task(tokens_of(engine, prompt))
            traces = await asyncio.gather(*(engine.trace(prompt + alone[:n]) for n in (0, 1, 7)))
            assert await answer == alone
            assert [trace.next_tokens[0][0] for trace in traces] == [alone[n] for n in (0, 1, 7)]
            assert [trace.position for trace in traces] == [len(prompt) - 1 + n for n in (0, 1, 7)]
        finally:
            await asyncio.to_thread(engine.close)

    asyncio.run(run())


def test_what_cannot_be_traced_is_refused_and_the_engine_goes_on() -> None:
    async def run() -> None:
        engine = AsyncEngine(new_llm())
        try:
            with pytest.raises(ValueError, match="a sequence of 0 tokens cannot be traced; allowed: 1 to 1024"):
                await engine.trace([])
            with pytest.raises(ValueError, match="1025 tokens"):
                await engine.trace([1] * 1025)
            with pytest.raises(IndexError):
                await engine.trace([999])  # no such token: its error stays with the trace
            assert (await engine.trace([3])).position == 0
            tracing = asyncio.create_task(engine.trace([1] * 1000))
            await asyncio.sleep(0)
            tracing.cancel()
            assert len(await tokens_of(engine, [1, 2, 3])) == 40
        finally:
            await asyncio.to_thread(engine.close)
        with pytest.raises(EngineError, match="closed"):
            await engine.trace([3])

    asyncio.run(run())


def test_a_scripted_model_has_no_layers(tmp_path: Path) -> None:
    class Model:
        config = tiny_config(vocab_size=64)

        def new_cache(self, batch_size: int, max_tokens: int) -> object:
            class Cache:
                lengths = [0] * batch_size

                def reset(self, slot: int) -> None: ...

            return Cache()

        def next_token_logits(self, *args: object) -> object: ...

    async def run() -> None:
        engine = AsyncEngine(LLM(Model()))  # type: ignore[arg-type]
        try:
            with pytest.raises(ValueError, match="a Model cannot be traced; allowed: a Transformer"):
                await engine.trace([3])
        finally:
            await asyncio.to_thread(engine.close)

    asyncio.run(run())
