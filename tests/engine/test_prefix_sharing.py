"""Prompts that begin alike and come together are read once, and nobody waits for a prompt that is not read on."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from dsv4.engine import LLM
from dsv4.engine.request import Request, RequestStatus
from dsv4.model.transformer import Transformer

from ..model.tiny import random_model
from .prefixes import CONFIG, IDS, assert_nothing_leaks, greedy, same, sampled


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(CONFIG)


def computed_tokens(llm: LLM) -> int:
    return int(llm.core.counters.step_tokens.sum)


@pytest.mark.parametrize("options", [{}, {"max_num_seqs": 2}, {"max_num_batched_tokens": 64}])
@pytest.mark.parametrize(("length", "n"), [(40, 3), (100, 8), (129, 3), (700, 4)])
def test_the_outputs_of_one_prompt_share_it(model: Transformer, length: int, n: int, options: dict) -> None:
    params = sampled(5, 4, n=n)
    llm = LLM(model, **options)
    outputs = llm.generate([IDS[:length]], params)[0].outputs
    assert [output.cached_tokens for output in outputs] == [0] + [length - 1] * (n - 1)
    assert computed_tokens(llm) == length + (n - 1) + 3 * n
    want = LLM(model, enable_prefix_caching=False).generate([IDS[:length]], params)[0].outputs
    assert same(outputs, want)
    assert not llm.core.scheduler.sharing._common
    assert_nothing_leaks(llm)


def test_prompts_of_a_batch_share_what_they_begin_with(model: Transformer) -> None:
    """Whole blocks of a longer prompt, all of one that is the beginning of another, and nothing over salts."""
    alike = [IDS[:600] + IDS[i : i + 50] for i in (700, 800, 900)]
    prompts = [*alike, IDS[1000:1200], IDS[1000:1300], IDS[:600], IDS[1400:1410], IDS[1400:1410]]
    params = [greedy(4)] * 5 + [greedy(4, cache_salt="other")] + [greedy(4)] * 2
    llm = LLM(model, max_num_batched_tokens=256)
    got = llm.generate(prompts, params)
    assert [output.cached_tokens for output in got] == [0, 512, 512, 0, 199, 0, 0, 0]
    assert same(got, LLM(model, enable_prefix_caching=False).generate(prompts, params))
    assert_nothing_leaks(llm)


@pytest.mark.parametrize("options", [{"enable_prefix_caching": False}, {"prefix_cache_bytes": 0}])
def test_where_nothing_is_stored_nobody_waits(model: Transformer, options: dict) -> None:
    llm = LLM(model, **options)
    requests = [llm.core.new_request(IDS[:300], greedy(2)) for _ in range(3)]
    for request in requests:
        llm.core.add(request)
    llm.core.step()
    assert all(request.num_computed_tokens for request in requests)
    while llm.core.has_work:
        llm.core.step()


def wait_for(llm: LLM, first: Request, *others: Request) -> None:
    """A step that reads a part of the first prompt, for which the others wait."""
    for request in (first, *others):
        llm.core.add(request)
    llm.core.step()
    assert 0 < first.num_computed_tokens < len(first.prompt_token_ids)
    assert all(other.status is RequestStatus.WAITING for other in others)


def test_who_waits_goes_on_when_the_other_is_cancelled(model: Transformer) -> None:
    llm = LLM(model, max_num_batched_tokens=128)
    requests = llm.core.new_requests(IDS[:700], greedy(3, n=3))
    wait_for(llm, *requests)
    llm.core.abort(requests[0])
    while llm.core.has_work:
        llm.core.step()
    assert [request.output.cached_tokens for request in requests] == [0, 0, 699]
    assert_nothing_leaks(llm)


def test_who_waits_begins_as_soon_as_the_common_part_is_read(model: Transformer) -> None:
    """The other is of another user, and reads on for long."""
    llm = LLM(model, max_num_batched_tokens=128)
    first = llm.core.new_request(IDS[:1500], greedy(3), ("a",))
    second = llm.core.new_request(IDS[:300] + IDS[700:710], greedy(3), ("b",))
    wait_for(llm, first, second)
    while first.num_computed_tokens < 256:
        llm.core.step()
    for _ in range(2):  # up to the place before its last token, and that
        llm.core.step()
    assert second.output.cached_tokens == 256 and second.output.token_ids
    assert first.num_uncomputed_tokens > 500
    llm.core.abort_all()


def test_nobody_waits_for_another_users_prompt_that_is_not_read_first(model: Transformer) -> None:
    llm = LLM(model, max_num_batched_tokens=128)
    prompts = {"a": IDS[:1500], "b": IDS[700:1300], "c": IDS[700:1300]}
    requests = [llm.core.new_request(prompt, greedy(1), (user,)) for user, prompt in prompts.items()]
    requests[0].takes_turns = False
    for request in requests:
        llm.core.add(request)
        llm.core.step()
    reading = [request for request in llm.core.scheduler.running if request.num_uncomputed_tokens > 1]
    assert not llm.core.scheduler.sharing.awaits(requests[2], [requests[0], requests[1]])
    assert llm.core.scheduler.sharing.awaits(requests[2], [requests[1], requests[0]]) or len(reading) == 3
    llm.core.abort_all()


@pytest.mark.parametrize("seed", range(4))
def test_everybody_ends_with_the_bits_of_an_engine_that_keeps_nothing(model: Transformer, seed: int) -> None:
    """Users who take turns, few rows and pages, prompts of three families, some cancelled."""
    r = random.Random(seed)
    families = [IDS[i : i + 500] for i in (0, 500, 900)]
    prompts = [r.choice(families)[: r.choice((60, 128, 300, 500))] + IDS[:: r.choice((31, 37, 600))] for _ in range(40)]
    params = [sampled(i, r.randint(1, 20)) for i in range(40)]
    want = LLM(model, enable_prefix_caching=False).generate(prompts, params)
    llm = LLM(
        model,
        max_num_seqs=r.choice((2, 4, 8)),
        max_model_len=768,
        num_pages=r.choice((8, 24)),
        max_num_batched_tokens=r.choice((32, 128, 512)),
        prefix_cache_bytes=r.choice((1 << 19, 1 << 30)),
        time_slice=4,
    )
    core = llm.core
    requests = [
        core.new_request(prompt, replace(param), r.choice((None, ("a",), ("b",))))
        for prompt, param in zip(prompts, params, strict=True)
    ]
    coming, cancelled = list(requests), {request for request in requests if r.random() < 0.2}
    for _ in range(20_000):
        for request in [coming.pop(0) for _ in range(min(len(coming), r.choice((0, 0, 1, 5))))]:
            core.add(request)
        core.step()
        for request in cancelled:
            if request.status is RequestStatus.RUNNING and r.random() < 0.1:
                core.abort(request)
        if not coming and not core.has_work:
            break
    assert all(request.finished for request in requests), "somebody starves"
    whole = [(request.output, o) for request, o in zip(requests, want, strict=True) if request not in cancelled]
    assert same([got for got, _ in whole], [o for _, o in whole])
    assert not core.scheduler.sharing._common
    assert_nothing_leaks(llm)
