"""The prompt's log-probabilities: the model's own, the same bits however it is cut and whatever runs beside."""

from __future__ import annotations

import pytest
import torch

import dsv4
from dsv4.config import nano_path
from dsv4.engine import LLM, SamplingParams, core
from dsv4.engine.step import ScheduledChunk

SCORED = SamplingParams(max_tokens=3, temperature=0.0, prompt_logprobs=True, logprobs=True, ignore_eos=True)
PROMPT = torch.randint(99, 8192, (331,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.fixture(scope="module")
def nano():
    return dsv4.load(nano_path())


def test_they_are_the_models_own(nano) -> None:
    (output,) = LLM(nano).generate([PROMPT], SCORED)
    with torch.inference_mode():
        rows = nano(torch.tensor([[*PROMPT, *output.token_ids]]))[0]
    want = [float(row.log_softmax(-1)[token]) for row, token in zip(rows, PROMPT[1:], strict=False)]
    assert output.prompt_logprobs == [None, *want]
    assert output.logprobs[0] == float(rows[330].log_softmax(-1)[output.token_ids[0]])


@pytest.mark.parametrize("budget", [8, 61, 128, 1024])
def test_every_cut_and_neighbour_gives_the_same_bits(nano, budget: int) -> None:
    (want,) = LLM(nano).generate([PROMPT], SCORED)
    plain = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
    llm = LLM(nano, max_num_batched_tokens=budget)
    outputs = llm.generate([PROMPT[:40], PROMPT, PROMPT[5:20], PROMPT[:7]], [plain, SCORED, SCORED, SCORED])
    assert (outputs[1].prompt_logprobs, outputs[1].token_ids) == (want.prompt_logprobs, want.token_ids)
    assert [len(output.prompt_logprobs) for output in outputs] == [0, 331, 15, 7]
    assert outputs[3].prompt_logprobs == want.prompt_logprobs[:7]
    assert outputs[0].token_ids == llm.generate([PROMPT[:40]], plain)[0].token_ids


def test_a_step_scores_a_bounded_number_of_tokens(model, monkeypatch) -> None:
    (whole,) = LLM(model).generate([[5] * 40], SCORED)
    monkeypatch.setattr(core, "PROMPT_LOGITS_BYTES", 4 * 53 * 7)  # rows of 53 fp32 logits
    model.batches.clear()
    (output,) = LLM(model).generate([[5] * 40], SCORED)
    assert output.prompt_logprobs == whole.prompt_logprobs
    assert [step[0][2] for step in model.batches] == [7, 7, 7, 7, 7, 5, 1, 1]


def test_they_have_as_many_alternatives_as_the_output(nano) -> None:
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=True, logprobs=3)
    for budget in (7, 1024):
        (output,) = LLM(nano, max_num_batched_tokens=budget, max_num_seqs=4).generate([PROMPT[:20]], params)
        found = output.prompt_top_logprobs
        assert found[0] == () and [len(alternatives) for alternatives in found[1:]] == [3] * 19
        for token, value, alternatives in zip(PROMPT[1:], output.prompt_logprobs[1:], found[1:], strict=False):
            assert alternatives[0][1] >= value and dict(alternatives).get(token, value) == value


def test_a_prompt_of_one_token_has_none(model) -> None:
    (output,) = LLM(model).generate([[5]], SCORED)
    assert output.prompt_logprobs == [None]
    assert LLM(model).generate([[5]], SamplingParams(max_tokens=1))[0].prompt_logprobs == []


def test_a_stream_has_them_with_the_first_token(model) -> None:
    llm = LLM(model)
    events = list(llm.stream([5, 6, 7], SCORED))
    assert events[0].prompt_logprobs == llm.generate([[5, 6, 7]], SCORED)[0].prompt_logprobs
    assert [len(event.prompt_logprobs) for event in events] == [3, 0, 0]


def test_rows_that_score_come_before_rows_that_yield_a_token(model) -> None:
    request = LLM(model).core.new_request([5, 6, 7, 8], SCORED)
    parts = [ScheduledChunk(request, *span) for span in ((0, 3), (3, 4), (0, 4), (2, 4))]
    assert [(part.num_scored, part.num_samples) for part in parts] == [(3, 0), (0, 1), (3, 1), (1, 1)]
