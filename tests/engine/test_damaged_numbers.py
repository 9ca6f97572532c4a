"""NaN or infinite logits, and weight files that change while served, raise EngineError and never give an answer."""

from __future__ import annotations

import asyncio
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from dsv4.commands.terminal.generate import generate
from dsv4.config import nano_path
from dsv4.engine import LLM, AsyncEngine, EngineError, SamplingParams
from dsv4.engine import core as engine_core
from dsv4.kernels import backends

NAN, INF = float("nan"), float("inf")
GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=6, seed=1, ignore_eos=True, logprobs=True)


def damage(model, values: dict[int, float] | float, after: int = 0) -> None:
    """Patches the model: from step `after` on, some or all logits of the last sampled row are `values`."""
    original = model.next_token_logits

    def damaged(batch, cache, rows: np.ndarray) -> torch.Tensor:
        logits = original(batch, cache, rows)
        if len(rows) and len(model.batches) > after:
            if isinstance(values, dict):
                for token, value in values.items():
                    logits[-1, token] = value
            else:
                logits[-1] = values
        return logits

    model.next_token_logits = damaged


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("values", [{7: NAN}, {7: INF}, {7: -INF, 8: NAN}, NAN, -INF], ids=str)
def test_no_answer_is_made_of_logits_that_are_no_numbers(values, params: SamplingParams, model) -> None:
    damage(model, values, after=2)
    llm = LLM(model)
    with pytest.raises(EngineError, match=r"the logits of request 2 after 4 tokens are not finite \(the largest is"):
        llm.generate([[3], [4, 5]], params)
    assert not llm.core.has_work and model.cache.lengths == [0] * 8
    stream = llm.stream([3], params)
    with pytest.raises(EngineError, match="not finite"):
        list(stream)
    del model.next_token_logits
    assert len(llm.generate([[3]], params)[0].token_ids) == 6, "the LLM is free for another try"


def test_minus_infinity_rules_one_token_out_and_no_more(model) -> None:
    damage(model, dict.fromkeys(range(3, 53), -INF))
    for params in (GREEDY, SAMPLED):
        assert set(LLM(model).generate([[3]], params)[0].token_ids) <= {0, 1, 2}


def run(work):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


def test_the_async_engine_tells_every_request_and_is_not_healthy_any_more(model) -> None:
    async def collect(engine: AsyncEngine, prompt: list[int]) -> list[int]:
        return [token async for event in engine.stream(prompt, GREEDY) for token in event.token_ids]

    async def main(engine: AsyncEngine) -> list[object]:
        return await asyncio.gather(*(collect(engine, [i + 2]) for i in range(3)), return_exceptions=True)

    damage(model, {7: NAN}, after=2)
    engine = AsyncEngine(LLM(model))
    try:
        errors = run(main(engine))
        assert all(isinstance(error, EngineError) and "not finite" in str(error) for error in errors)
        assert not engine.healthy and "not finite" in str(engine.error)
        with pytest.raises(EngineError, match="not finite"):
            engine.check()
    finally:
        engine.close()


def test_the_command_ends_with_a_line_and_a_status(model, text_folder, monkeypatch, capsys) -> None:
    model.config = type(model)(300).config
    damage(model, NAN)
    llm = LLM(model, folder=text_folder)
    monkeypatch.setattr("dsv4.commands.terminal.generate.LLM", lambda path, **options: llm)
    for as_json in (False, True):
        assert generate(None, ["the cat"], max_tokens=3, as_json=as_json) == 1
        assert "dsv4 generate: error: the engine has failed: the logits of request" in capsys.readouterr().err


@pytest.fixture
def copy_of_nano(tmp_path: Path) -> Path:
    if backends.native_module() is None:
        pytest.skip("the reference kernels keep no weights in files")
    for file in nano_path().iterdir():
        shutil.copy(file, tmp_path)
    return tmp_path


def change(folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    with file.open("ab") as handle:
        handle.write(b"x")


def test_weights_that_change_under_an_llm_stop_it(copy_of_nano: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(copy_of_nano)
    stream = llm.stream("1, 2,", SamplingParams(max_tokens=50, ignore_eos=True))
    next(stream)
    change(copy_of_nano)
    monkeypatch.setattr(llm.core, "_next_check", 0.0)  # stands for a second's delay
    with pytest.raises(EngineError, match=r"safetensors was written to since it was opened; the weights are no longer"):
        list(stream)
    with pytest.raises(EngineError, match="was written to"):  # a new request does not wait for the next file check
        llm.generate("1, 2,", GREEDY)


def test_weights_that_change_under_an_idle_engine_make_it_unhealthy(
    copy_of_nano: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        for _ in range(3000):
            if not engine.healthy:
                return
            await asyncio.sleep(0.02)

    engine = AsyncEngine(LLM(copy_of_nano))
    try:
        change(copy_of_nano)
        run(main())
        assert "was written to" in str(engine.error)
    finally:
        engine.close()


def test_files_are_looked_at_once_a_second(model, monkeypatch: pytest.MonkeyPatch) -> None:
    now, looks = [100.0], []
    monkeypatch.setattr(engine_core.time, "monotonic", lambda: now[0])
    llm = LLM(model)
    llm.core._files_change = lambda: looks.append(now[0])
    llm.generate([[3]], SAMPLED)
    assert looks == [100.0], "once, before the request is admitted"
    now[0] += engine_core.CHECK_SECONDS
    llm.core.step()
    llm.core.step()
    assert looks == [100.0, 101.0]
