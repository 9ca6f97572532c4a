"""A request that begins at a stored prefix has the bits of one that computes all, and says how much it did not."""

from __future__ import annotations

import random

import pytest
import torch

from dsv4.engine import LLM, SamplingParams
from dsv4.model.transformer import Transformer

from ..model.tiny import random_model
from .prefixes import BITS, CONFIG, IDS, assert_nothing_leaks, cache_of, greedy, same, sampled


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(CONFIG)


@pytest.mark.parametrize("budget", [1024, 100])
def test_a_hit_gives_the_bits_of_a_miss(each_model: Transformer, budget: int) -> None:
    """The same prompt again, one that goes on from its answer, and two that leave it within a block and at one's end;
    alone and all at once, in chunks of any size, and after everything was evicted."""
    first = IDS[:300]
    answer = LLM(each_model, enable_prefix_caching=False).generate([first], greedy())[0].token_ids
    prompts = [first, [*first, *answer, *IDS[900:950]], IDS[:270] + IDS[600:700], IDS[:256] + IDS[700:720], IDS[:299]]
    params = [greedy(), greedy(), sampled(3), sampled(4), sampled(5)]
    want = LLM(each_model, enable_prefix_caching=False).generate(prompts, params)
    llm = LLM(each_model, max_num_batched_tokens=budget, snapshot_interval=192)
    one_by_one = [llm.generate([prompt], param)[0] for prompt, param in zip(prompts, params, strict=True)]
    assert same(one_by_one, want)
    assert [o.cached_tokens for o in one_by_one] == [0, 305, 192, 256, 256]
    again = llm.generate(prompts, params)
    assert same(again, want)
    assert [o.cached_tokens for o in again] == [len(prompt) - 1 for prompt in prompts]
    llm.reset_prefix_cache()
    assert same(llm.generate(prompts, params), want)
    assert_nothing_leaks(llm)


def test_a_hit_on_the_embedded_model_gives_the_bits_of_a_miss() -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 12
    prompts, params = [text, text, text + "Then"], [greedy(9), sampled(2, 9), sampled(2, 9)]
    for numerics in ("float", "shipped"):
        want = LLM(numerics=numerics, enable_prefix_caching=False).generate(prompts, params)
        llm = LLM(numerics=numerics)
        assert same(llm.generate(prompts, params), want)
        got = llm.generate(prompts, params)
        assert same(got, want) and all(o.cached_tokens == len(o.prompt_token_ids) - 1 for o in got)


@pytest.mark.parametrize("length", [1, 2, 127, 128, 129, 130, 256, 300])
def test_the_same_prompt_again_computes_one_token(model: Transformer, length: int) -> None:
    llm = LLM(model)
    outputs = [llm.generate([IDS[:length]], greedy())[0] for _ in range(2)]
    assert [o.cached_tokens for o in outputs] == [0, length - 1]
    assert outputs[1].timings is not None and outputs[1].timings.num_cached_tokens == length - 1


def test_a_conversation_computes_what_is_new(model: Transformer) -> None:
    llm, prompt, computed = LLM(model), IDS[:200], []
    for turn in range(4):
        output = llm.generate([prompt], greedy(7))[0]
        computed.append(len(prompt) - output.cached_tokens)
        prompt = [*prompt, *output.token_ids, *IDS[500 + 30 * turn : 530 + 30 * turn]]
    assert computed == [200, 31, 31, 31], "the last token of an answer was never computed"
    edited = [*IDS[:200], *IDS[800:820]]
    assert llm.generate([edited], greedy())[0].cached_tokens == 200, "the end of the user's input"


def test_a_prefix_that_is_seen_twice_is_stored(model: Transformer) -> None:
    """The second request computes through the place where it leaves the first; the third begins there."""
    llm = LLM(model)
    prompts = [IDS[:400] + IDS[i : i + 50] for i in (500, 600, 700)]
    assert [llm.generate([prompt], greedy())[0].cached_tokens for prompt in prompts] == [0, 0, 384]


def test_long_prompts_are_stored_every_so_many_tokens(model: Transformer) -> None:
    llm = LLM(model, snapshot_interval=256, max_num_batched_tokens=200)
    llm.generate([IDS[:1000]], greedy())
    lengths = {entry.length for entry in llm.core.scheduler.cache_manager.prefixes._entries}
    assert lengths == {256, 512, 768, 999, 1000, 1005}
    assert llm.generate([IDS[:600] + IDS[:9]], greedy())[0].cached_tokens == 512


def test_waiting_prompts_are_looked_up_only_when_prefixes_change(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one long prompt is read, others wait beside free rows, and every step asks again whether they may begin."""
    llm = LLM(model, max_num_seqs=4, max_num_batched_tokens=16, max_num_partial_prefills=1)
    core, manager = llm.core, llm.core.scheduler.cache_manager
    assert manager.prefixes is not None
    versions: list[int] = []
    find = manager.prefixes.find
    monkeypatch.setattr(
        manager.prefixes, "find", lambda *args: versions.append(manager.prefixes.version) or find(*args)
    )
    requests = [core.new_request([*IDS[:250], i], greedy(2)) for i in range(6)]
    for request in requests:
        core.add(request)
    while core.has_work:
        core.step()
    assert max(versions.count(version) for version in set(versions)) <= len(requests)
    assert all(request.output.token_ids for request in requests) and not manager._matches
    assert_nothing_leaks(llm)


def test_requests_of_other_salts_share_nothing(model: Transformer) -> None:
    llm = LLM(model)
    salts = (None, "a", "b", "a", None, "b")
    cached = [llm.generate([IDS[:200]], greedy(cache_salt=salt))[0].cached_tokens for salt in salts]
    assert cached == [0, 0, 0, 199, 199, 199]
    for salt in ("", 5):
        with pytest.raises(ValueError, match=r"SamplingParams.cache_salt is .*; allowed: a string of at least 1"):
            SamplingParams(cache_salt=salt)  # type: ignore[arg-type]


def test_running_requests_share_the_pages_of_their_prefix(model: Transformer) -> None:
    llm = LLM(model)
    llm.generate([IDS[:512]], greedy(1))
    core = llm.core
    requests = [core.new_request(IDS[:512] + IDS[i : i + 9], greedy(20)) for i in range(600, 680, 10)]
    for request in requests:
        core.add(request)
    for _ in range(4):
        core.step()
    rows = [cache_of(llm).pages_of(request.slot) for request in requests]
    assert len(rows) == 8 and all(pages[:4] == rows[0][:4] for pages in rows)
    assert len({pages[4] for pages in rows}) == 8
    for request in requests:
        core.abort(request)
    assert_nothing_leaks(llm)


def test_cancelling_frees_all_but_what_is_stored_and_stores_what_was_answered(model: Transformer) -> None:
    llm = LLM(model, max_num_batched_tokens=100, snapshot_interval=1024)
    core, cache = llm.core, cache_of(llm)
    request = core.new_request(IDS[:300], greedy())
    core.add(request)
    core.step()
    assert cache.pool.num_used == 1
    core.abort(request)
    assert cache.pool.num_used == 0, "a prompt that was read in part"
    stream = llm.stream(IDS[:300], greedy(50))
    output = [next(stream).token_ids[0] for _ in range(20)]
    stream.close()
    assert llm.generate([IDS[:300] + output], greedy())[0].cached_tokens == 319
    assert_nothing_leaks(llm)


def test_bytes_stay_within_their_budget(model: Transformer, caplog: pytest.LogCaptureFixture) -> None:
    state = LLM(model).core.runner.cache.snapshot(0).num_bytes
    llm = LLM(model, prefix_cache_bytes=5 * state)
    stored = llm.core.scheduler.cache_manager.prefixes
    for place in range(8):
        llm.generate([IDS[place : place + 150]], greedy())
        assert 0 < stored.num_bytes <= 5 * state
    assert llm.generate([IDS[7:157]], greedy())[0].cached_tokens == 149
    assert llm.generate([IDS[:150]], greedy())[0].cached_tokens == 0
    assert not caplog.records
    LLM(model, prefix_cache_bytes=state - 1)
    (record,) = caplog.records
    assert f"prefix_cache_bytes is {state - 1}: no prefix is kept in memory" in record.getMessage()
    none = LLM(model, prefix_cache_bytes=0)
    assert len(caplog.records) == 1
    assert [none.generate([IDS[:150]], greedy())[0].cached_tokens for _ in range(2)] == [0, 0]
    assert_nothing_leaks(llm)
    assert_nothing_leaks(none)


def test_nothing_is_kept_of_a_step_that_failed(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(model)
    want = llm.generate([IDS[:300]], greedy())
    stream = llm.stream(IDS[:300], greedy(50))
    next(stream)

    def fail(*_: object) -> None:
        raise RuntimeError("the model broke")

    with monkeypatch.context() as broken:
        broken.setattr(llm.core.runner, "run", fail)
        with pytest.raises(RuntimeError, match="the model broke"):
            next(stream)
    assert len(llm.core.scheduler.cache_manager.prefixes) == 0 and cache_of(llm).pool.num_used == 0
    got = llm.generate([IDS[:300]], greedy())
    assert got[0].cached_tokens == 0 and same(got, want)


def test_prefixes_of_former_weights_are_forgotten() -> None:
    model = random_model(CONFIG)
    llm = LLM(model)
    llm.generate([IDS[:200]], greedy())
    with torch.no_grad():
        model.head.weight.mul_(-1.0)
    model.refresh()
    got = llm.generate([IDS[:200]], greedy())[0]
    assert got.cached_tokens == 0 and got.token_ids == LLM(model).generate([IDS[:200]], greedy())[0].token_ids
    llm.reset_prefix_cache()
    assert llm.generate([IDS[:200]], greedy())[0].cached_tokens == 0


@pytest.mark.parametrize("seed", range(3))
def test_random_requests_leave_nothing_and_have_the_tokens_of_an_engine_without_prefixes(
    model: Transformer, seed: int
) -> None:
    """A hundred requests over six prefixes and two salts, some cancelled at any step, in a pool for three full rows."""
    r = random.Random(seed)
    starts = [IDS[i : i + r.randint(1, 500)] for i in range(0, 600, 100)]
    asked = []
    for number in range(100):
        tail = [r.randrange(CONFIG.vocab_size) for _ in range(r.choice((0, 1, 5, 60, 200)))]
        prompt = r.choice(starts)[: r.choice((600, 600, 130, 256))] + tail
        params = r.choice((greedy, lambda n, **o: sampled(number, n, **o)))(r.randint(1, 40), cache_salt=r.choice("ab"))  # noqa: B023
        asked.append((prompt, params, r.random() < 0.2))
    plain = LLM(model, enable_prefix_caching=False)
    whole = plain.generate([prompt for prompt, *_ in asked], [params for _, params, _ in asked])
    llm = LLM(
        model,
        max_num_seqs=6,
        max_model_len=768,
        num_pages=18,
        max_num_batched_tokens=r.choice((64, 200, 1024)),
        snapshot_interval=r.choice((100, 256, 4096)),
        prefix_cache_bytes=r.choice((1 << 21, 1 << 30)),
    )
    core, coming, requests = llm.core, list(asked), []
    while coming or core.has_work:
        for _ in range(min(len(coming), r.choice((0, 0, 1, 3)))):
            prompt, params, cancelled = coming.pop(0)
            requests.append((core.new_request(prompt, params), cancelled))
            core.add(requests[-1][0])
        core.step()
        for request, cancelled in requests:
            if cancelled and not request.finished and r.random() < 0.05:
                core.abort(request)
        stored = core.scheduler.cache_manager.prefixes
        assert stored.num_bytes <= stored.max_bytes or any(entry.holders for entry in stored._entries)
    for (request, cancelled), want in zip(requests, whole, strict=True):
        got, count = request.output, len(request.output.token_ids)
        if BITS:
            assert got.token_ids == want.token_ids[:count] and got.logprobs == want.logprobs[:count]
        assert cancelled or same([got], [want])
    assert sum(request.output.cached_tokens > 0 for request, _ in requests) > 10
    assert_nothing_leaks(llm)
