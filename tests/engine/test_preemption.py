"""A pool of pages that is smaller than all rows: who is admitted, who gives way, and that no token depends on it."""

from __future__ import annotations

import pytest

from dsv4.engine import LLM
from dsv4.engine.request import Request, RequestStatus
from dsv4.kernels import backends
from dsv4.model.transformer import Transformer

from ..model.tiny import random_model
from .prefixes import CONFIG, IDS, assert_nothing_leaks, cache_of, greedy, same, sampled

PROMPTS = [IDS[i : i + 120] for i in (0, 200, 400, 600)]


def preempted_bytes(llm: LLM) -> float:
    (metric,) = (metric for metric in llm.core.metrics.collect() if metric.name == "dsv4:cache_bytes")
    return dict(metric.samples)[("component", "preempted"),]  # type: ignore[return-value]


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(CONFIG)


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("path", ["reference", "native"])
def test_giving_way_changes_no_token_and_computes_none_twice(
    path: str, caching: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two answers that need three pages each, in a pool of five."""
    if path == "reference":
        monkeypatch.setattr(backends, "native_module", lambda: None)
    elif backends.native_module() is None:
        pytest.skip("the native kernels are not built")
    model = random_model(CONFIG)
    params = [greedy(145), sampled(1, 145)]
    want = LLM(model, enable_prefix_caching=False).generate(PROMPTS[:2], params)
    llm = LLM(model, num_pages=5, max_model_len=512, enable_prefix_caching=caching)
    tokens, run = [], llm.core.runner.run

    def count(chunks):
        tokens.append(sum(chunk.num_tokens for chunk in chunks))
        return run(chunks)

    monkeypatch.setattr(llm.core.runner, "run", count)
    assert same(llm.generate(PROMPTS[:2], params), want)
    assert llm.core.scheduler.cache_manager.num_preemptions == 1
    assert sum(tokens) == 2 * (120 + 144), "every token was computed once"
    assert_nothing_leaks(llm)


def test_a_half_read_prompt_gives_way_and_goes_on(model: Transformer) -> None:
    llm = LLM(model, num_pages=10, max_model_len=1280, max_num_batched_tokens=64, enable_prefix_caching=False)
    core = llm.core
    old, young = core.new_request(PROMPTS[0], greedy(500)), core.new_request(IDS[:700], greedy())
    for request in (old, young):
        core.add(request)
    while young.num_computed_tokens < 300:
        core.step()
    core.scheduler._preempt(young)
    assert young.saved is not None and young.slot == -1 and cache_of(llm).pool.num_used < 3
    assert preempted_bytes(llm) == young.saved.num_bytes > 3 * cache_of(llm).page_bytes
    while core.has_work:
        core.step()
    assert preempted_bytes(llm) == 0
    want = LLM(model, enable_prefix_caching=False).generate([PROMPTS[0], IDS[:700]], [greedy(500), greedy()])
    assert same([old.output, young.output], want)


def test_the_youngest_gives_way_and_goes_on_before_those_that_came_later(model: Transformer) -> None:
    llm = LLM(model, num_pages=8, max_model_len=512, max_num_seqs=3)
    core = llm.core
    requests = [core.new_request(prompt, greedy(300)) for prompt in PROMPTS]
    for request in requests:
        core.add(request)
    manager = core.scheduler.cache_manager
    while not manager.num_preemptions:
        core.step()
    waits = [request.status is RequestStatus.WAITING for request in requests]
    assert waits[:2] == [False, True] or waits[:3] == [False, False, True]
    order = []
    while core.has_work:
        order += [request.request_id for request, event in core.step() if event.finish_reason]
    assert order == sorted(order)
    assert_nothing_leaks(llm)


def test_a_request_that_gave_way_is_cancelled_like_any(model: Transformer) -> None:
    llm = LLM(model, num_pages=6, max_model_len=512)
    core = llm.core
    requests = [core.new_request(prompt, greedy(300)) for prompt in PROMPTS]
    for request in requests:
        core.add(request)
    while not any(request.saved for request in requests):
        core.step()
    for request in requests:
        core.abort(request)
        assert request.saved is None
    assert preempted_bytes(llm) == 0
    assert_nothing_leaks(llm)


@pytest.mark.parametrize("state", ["reading", "decoding", "waiting to continue", "waiting"])
def test_a_cancelled_request_frees_all_it_holds_before_the_next_step(model: Transformer, state: str) -> None:
    """Its row goes to the next request in that very step."""
    llm = LLM(model, max_num_seqs=1, max_num_batched_tokens=64, time_slice=4, enable_prefix_caching=False)
    core, pool = llm.core, cache_of(llm).pool
    first = core.new_request(IDS[:300], greedy(200), user=("a",))
    core.add(first)
    others: list[Request] = []
    while first.num_computed_tokens < (100 if state == "reading" else 310):
        core.step()
    if state.startswith("waiting"):
        others.append(core.new_request(PROMPTS[0], greedy(50), user=("a",)))
        core.add(others[0])
        while state == "waiting to continue" and first.saved is None:
            core.step()
    doomed = others[0] if state == "waiting" else first
    last = core.new_request(PROMPTS[1], greedy(3), user=("a",))
    core.add(last)
    core.abort(doomed)
    assert (doomed.saved, doomed.slot) == (None, -1)
    assert pool.num_used == sum(len(cache_of(llm).pages_of(r.slot)) for r in core.scheduler.running)
    core.step()
    assert core.scheduler.running or core.scheduler.waiting == [last]
    while core.has_work:
        core.step()
    assert len(last.output.token_ids) == 3
    assert_nothing_leaks(llm)


def test_turns_change_no_token(model: Transformer) -> None:
    """Six answers in two rows, a few tokens per turn."""
    llm = LLM(model, max_num_seqs=2, time_slice=3)
    requests = [llm.core.new_request(IDS[i : i + 140], sampled(i, 20), user=("a",)) for i in range(0, 600, 100)]
    for request in requests:
        llm.core.add(request)
    while llm.core.has_work:
        llm.core.step()
    assert llm.core.scheduler.cache_manager.num_preemptions > 10
    want = LLM(model, enable_prefix_caching=False).generate(
        [request.prompt_token_ids for request in requests], [request.params for request in requests]
    )
    assert same([request.output for request in requests], want)
    assert_nothing_leaks(llm)


def test_a_request_waits_for_pages_and_stored_prefixes_make_room(model: Transformer) -> None:
    llm = LLM(model, num_pages=8, max_model_len=1024)
    llm.generate([IDS[:800]], greedy())
    assert cache_of(llm).num_free_pages < 2
    core = llm.core
    first, second = (core.new_request(IDS[i : i + 600], greedy()) for i in (700, 800))
    core.add(first)
    core.add(second)
    core.step()
    assert (first.status, second.status) == (RequestStatus.RUNNING, RequestStatus.WAITING)
    while core.has_work:
        core.step()
    assert len(second.output.token_ids) == 6 and core.scheduler.cache_manager.num_preemptions == 0
    assert_nothing_leaks(llm)


@pytest.mark.parametrize(("pages", "again"), [(4, 0), (6, 499)])
def test_a_request_that_fills_all_pages_runs_again_and_again(model: Transformer, pages: int, again: int) -> None:
    """Its stored prefixes hold copies of its last page, which it may need itself."""
    llm = LLM(model, num_pages=pages, max_model_len=512)
    (want,) = LLM(model, max_model_len=512).generate([IDS[:500]], greedy(50))
    for cached in (0, again, again):
        output = llm.generate([IDS[:500]], greedy(50))[0]
        assert same([output], [want]) and len(output.token_ids) == 12 and output.cached_tokens == cached
    assert_nothing_leaks(llm)


def test_a_prompt_that_can_never_fit_is_refused_at_once_with_the_numbers(model: Transformer) -> None:
    llm = LLM(model, num_pages=4)
    with pytest.raises(
        ValueError,
        match="513 tokens; the limit is max_model_len = 512; it needs 5 pages of 128 tokens, the cache has 4$",
    ):
        llm.generate([IDS[:513]], greedy())
    with pytest.raises(
        ValueError, match=r"max_model_len is 600; allowed: \[2, 512\] \(the cache has num_pages = 4 of 128 tokens\)"
    ):
        LLM(model, num_pages=4, max_model_len=600)


def test_a_model_whose_cache_has_no_pages_is_told() -> None:
    from .conftest import HistoryModel

    with pytest.raises(ValueError, match="num_pages is 4; the cache of a HistoryModel has no pages"):
        LLM(HistoryModel(), num_pages=4)
