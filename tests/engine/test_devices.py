"""Scheduler, cache, stored prefixes and preemption on every device, through plain torch.

On the CPU the same code runs with the same checks; on CUDA tokens are those of the CPU where no rounding decides.
"""

from __future__ import annotations

import copy

import pytest
import torch

from dsv4.engine import LLM, RequestOutput
from dsv4.kernels import backends
from dsv4.model.transformer import Transformer

from ..model.tiny import random_model
from .prefixes import CONFIG, IDS, assert_nothing_leaks, cache_of, greedy, sampled

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
    ),
]
PROMPTS = [IDS[i : i + 120] for i in (0, 200, 400, 600)]


@pytest.fixture(autouse=True)
def plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "native_module", lambda: None)


def model_on(device: str) -> Transformer:
    model = random_model(CONFIG)
    return copy.deepcopy(model).cuda() if device == "cuda" else model


def agree(got: list[RequestOutput], want: list[RequestOutput]) -> bool:
    """Log-probabilities of the first tokens: later ones may follow from another rounding."""
    first = [torch.tensor([output.logprobs[0] for output in outputs]) for outputs in (got, want)]
    lengths = [[len(output.token_ids) for output in outputs] for outputs in (got, want)]
    return lengths[0] == lengths[1] and torch.allclose(*first, atol=1e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_a_mixed_batch_is_that_of_requests_alone(device: str) -> None:
    model = model_on(device)
    params = [greedy(5), sampled(1, 9), greedy(3, prompt_logprobs=True), sampled(2, 2)]
    together = LLM(model, device=device, max_num_batched_tokens=64).generate(PROMPTS, params)
    alone = [LLM(model, device=device).generate([p], [s])[0] for p, s in zip(PROMPTS, params, strict=True)]
    assert agree(together, alone)
    assert len(together[2].prompt_logprobs) == 120


@pytest.mark.parametrize("device", DEVICES)
def test_a_stored_prefix_answers_as_the_whole_prompt(device: str) -> None:
    llm = LLM(model_on(device), device=device, max_num_batched_tokens=64)
    first, again = (llm.generate([IDS[:300]], greedy())[0] for _ in range(2))
    longer = llm.generate([IDS[:310]], greedy())[0]
    assert (again.cached_tokens, longer.cached_tokens) == (299, 300)
    plain = LLM(llm.core.runner.model, device=device, enable_prefix_caching=False)  # type: ignore[arg-type]
    assert agree([first, again, longer], plain.generate([IDS[:300], IDS[:300], IDS[:310]], greedy()))
    assert_nothing_leaks(llm)


@pytest.mark.parametrize("device", DEVICES)
def test_giving_way_for_pages_keeps_the_state(device: str) -> None:
    model = model_on(device)
    params = [greedy(145), sampled(1, 145)]
    llm = LLM(model, device=device, num_pages=5, max_model_len=512)
    got = llm.generate(PROMPTS[:2], params)
    assert llm.core.scheduler.cache_manager.num_preemptions == 1
    assert agree(got, LLM(model, device=device).generate(PROMPTS[:2], params))
    assert_nothing_leaks(llm)


@pytest.mark.parametrize("device", DEVICES)
def test_turns_keep_the_state(device: str) -> None:
    model = model_on(device)
    llm = LLM(model, device=device, max_num_seqs=2, time_slice=3)
    requests = [llm.core.new_request(prompt, greedy(12), user=("a",)) for prompt in PROMPTS]
    for request in requests:
        llm.core.add(request)
    while llm.core.has_work:
        llm.core.step()
    assert llm.core.scheduler.cache_manager.num_preemptions > 4
    assert agree([request.output for request in requests], LLM(model, device=device).generate(PROMPTS, greedy(12)))
    assert_nothing_leaks(llm)


@pytest.mark.parametrize("device", DEVICES)
def test_metrics_of_the_cache_count_its_bytes(device: str) -> None:
    llm = LLM(model_on(device), device=device)
    llm.generate(PROMPTS, greedy())
    found = {metric.name: metric for metric in llm.core.metrics.collect()}
    sizes = {labels[0][1]: value for labels, value in found["dsv4:cache_bytes"].samples}
    cache = cache_of(llm)
    assert sizes["entries"] + sizes["index_keys"] == cache.pool.num_used * cache.page_bytes > 0
