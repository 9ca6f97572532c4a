"""Bias and penalties: each alone, in their order, and in the sampler before the mask."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from dsv4.engine import LLM, SamplingParams
from dsv4.engine.logits import add_bias, make_processors, penalize_repetition, process_logits
from dsv4.engine.sampler import SampleRequest, sample
from dsv4.engine.step import ScheduledChunk

ROW = torch.tensor([0.5, 2.0, -1.0, 1.5])
INF = float("inf")
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


def test_a_bias_is_added() -> None:
    assert add_bias(ROW, {1: -3.0, 2: 4.0}).tolist() == [0.5, -1.0, 3.0, 1.5]


def test_penalties_count_what_was_written() -> None:
    assert penalize_repetition(ROW, {1: 2, 3: 1, 0: 0}, 0.5, 0.25).tolist() == [0.5, 1.0, -1.0, 0.75]
    assert penalize_repetition(ROW, {1: 3}, 0.0, -1.0).tolist() == [0.5, 5.0, -1.0, 1.5], "negative ones encourage"
    assert penalize_repetition(ROW, {}, 1.0, 1.0).tolist() == ROW.tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: add_bias(ROW, {4: 1.0}), r"token id 4; allowed: \[0, 3\]"),
        (lambda: penalize_repetition(ROW, {-1: 1}, 1.0, 0.0), r"token id -1; allowed: \[0, 3\]"),
    ],
)
def test_what_does_not_fit_the_vocabulary_is_named(change, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        change()


def test_the_order_is_bias_penalties() -> None:
    processors = make_processors({3: INF, 0: 1.0}, 0.5, 0.0)
    assert len(processors) == 2
    assert process_logits(ROW, processors, {0: 1}).tolist() == [1.0, 2.0, -1.0, INF]
    by_hand = penalize_repetition(add_bias(ROW, {3: INF, 0: 1.0}), {0: 1}, 0.5, 0.0)
    assert torch.equal(process_logits(ROW, processors, {0: 1}), by_hand)
    assert make_processors() == () and process_logits(ROW, (), {}) is ROW


def test_the_row_itself_stays_as_it_is() -> None:
    before = ROW.clone()
    process_logits(ROW, make_processors({0: 1.0}, 1.0, 1.0), {1: 2})
    sample(ROW[None], [SampleRequest(SamplingParams(), 1, 0, allowed=np.array([0b0111], dtype=np.uint32))])
    assert torch.equal(ROW, before)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_token_is_drawn_after_processors_and_mask_and_its_logprob_is_the_models(temperature: float) -> None:
    params = SamplingParams(temperature=temperature, logprobs=1)
    row = SampleRequest(params, 1, 0, make_processors({3: 100.0}), {}, np.array([0b0100], dtype=np.uint32))
    (token,) = sample(ROW[None], [row])
    assert token.token_id == 2
    assert token.logprob == pytest.approx(float(ROW.log_softmax(-1)[2]))
    assert token.alternatives[0][0] == 1


def test_a_request_counts_its_output_and_its_drafts(model) -> None:
    core = LLM(model).core
    request = core.new_request([5, 5], dataclasses.replace(GREEDY, frequency_penalty=1.0))
    core.add(request)
    for _ in range(4):
        core.step()
    assert request.output_counts.total() == 4, "the prompt does not count"
    drafted = ScheduledChunk(request, request.num_tokens - 1, request.num_tokens, (7, 7)).sample_requests()
    counts = [row.output_counts[7] - request.output_counts[7] for row in drafted if row.output_counts is not None]
    assert counts == [0, 1, 2]
    assert [row.position for row in drafted] == [4, 5, 6]


def test_a_strong_penalty_never_writes_a_token_twice(model) -> None:
    core = LLM(model).core
    requests = [core.new_request([5], dataclasses.replace(GREEDY, max_tokens=40)) for _ in range(2)]
    requests[0].processors = make_processors(presence_penalty=100.0)
    for request in requests:
        core.add(request)
    while core.has_work:
        core.step()
    penalized, plain = (request.output.token_ids for request in requests)
    assert len(set(penalized)) == 40 > len(set(plain))


def test_bias_and_penalties_of_a_request_are_those_of_the_pure_functions(model) -> None:
    params = dataclasses.replace(GREEDY, logit_bias={7: 2.5, 9: -100.0}, presence_penalty=0.75, frequency_penalty=0.5)
    written: list[int] = []
    for token in LLM(model).generate([[5, 6]], params)[0].token_ids:
        row = add_bias(model.expected_logits([5, 6, *written]), {7: 2.5, 9: -100.0})
        counts = {token: written.count(token) for token in written}
        assert token == int(penalize_repetition(row, counts, 0.75, 0.5).argmax())
        written.append(token)
    assert written != LLM(model).generate([[5, 6]], GREEDY)[0].token_ids


def test_a_bias_outside_the_vocabulary_is_refused_before_anything_runs(model) -> None:
    with pytest.raises(ValueError, match=r"logit_bias has token id 53; allowed: \[0, 52\]"):
        LLM(model).generate([[5]], dataclasses.replace(GREEDY, logit_bias={53: 1.0}))
    assert model.batches == []
