"""Speculative decoding: drafts equal to the sampled tokens are accepted, and the answer is the same as without."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from dsv4.engine import LLM, RequestOutput, SamplingParams
from dsv4.engine.outputs import SampledToken
from dsv4.engine.request import Request
from dsv4.engine.sampler import verified
from dsv4.engine.step import ScheduledChunk

from .conftest import EOS, TEXT_VOCAB

PROMPTS = [[5, 6, 7], [8, 9], [4] * 20]
GREEDY = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True, logprobs=2)
SAMPLED = SamplingParams(temperature=1.0, seed=3, max_tokens=9, ignore_eos=True, logprobs=2)


def draft(llm: LLM, propose: Callable[[Request], list[int]]) -> None:
    """Gives every sampling chunk the drafts of `propose` for its request."""
    schedule = llm.core.scheduler.schedule

    def with_drafts() -> list[ScheduledChunk]:
        return [
            dataclasses.replace(chunk, draft_token_ids=tuple(propose(chunk.request))) if chunk.num_samples else chunk
            for chunk in schedule()
        ]

    llm.core.scheduler.schedule = with_drafts  # type: ignore[method-assign]


def drafts_of(outputs: list[RequestOutput], count: int, wrong: int | None) -> Callable[[Request], list[int]]:
    """Drafts: the next `count` tokens of the known outputs, with a different token at index `wrong`."""
    known = {tuple(output.prompt_token_ids): output.token_ids for output in outputs}

    def propose(request: Request) -> list[int]:
        done = len(request.output.token_ids)
        right = known[tuple(request.prompt_token_ids)][done : done + count]
        return [token if place != wrong else (token + 1) % 53 for place, token in enumerate(right)]

    return propose


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("wrong", [None, 0, 1, 2])
def test_drafts_change_the_steps_and_not_the_tokens(model, params: SamplingParams, wrong: int | None) -> None:
    plain = LLM(model).generate(PROMPTS, params)
    without = len(model.batches)
    llm = LLM(model)
    draft(llm, drafts_of(plain, 3, wrong))
    outputs = llm.generate(PROMPTS, params)
    uncounted = {"timings": None, "num_draft_tokens": 0, "num_accepted_tokens": 0}
    assert [dataclasses.replace(o, **uncounted) for o in outputs] == [
        dataclasses.replace(o, **uncounted) for o in plain
    ]
    stands = 1 + (3 if wrong is None else wrong)
    assert len(model.batches) - without == -(-9 // stands)
    assert model.cache.lengths == [0] * 8


def test_an_event_holds_all_tokens_of_its_step(model) -> None:
    plain = LLM(model).generate([[5, 6]], GREEDY)
    llm = LLM(model)
    draft(llm, drafts_of(plain, 3, None))
    events = list(llm.stream([5, 6], GREEDY))
    assert [len(event.token_ids) for event in events] == [4, 4, 1]
    assert [token for event in events for token in event.token_ids] == plain[0].token_ids
    assert [value for event in events for value in event.logprobs] == plain[0].logprobs
    assert [row for event in events for row in event.top_logprobs] == plain[0].top_logprobs
    assert [event.timings.num_output_tokens for event in events if event.timings] == [4, 8, 9]


@pytest.mark.parametrize(
    ("params", "tokens", "reason"),
    [
        (SamplingParams(temperature=0.0), [7, 8, EOS], "stop"),
        (SamplingParams(temperature=0.0, stop_token_ids=(8,)), [7, 8], "stop"),
        (SamplingParams(temperature=0.0, max_tokens=2), [7, 8], "length"),
    ],
    ids=["end of sentence", "stop token", "max_tokens"],
)
def test_what_comes_after_the_end_is_dropped(model, params: SamplingParams, tokens: list[int], reason: str) -> None:
    model.scripts[(5, 6)] = [7, 8, EOS, 9, 10, 11]
    llm = LLM(model)
    draft(llm, lambda request: [7, 8, EOS, 9, 10])
    output = llm.generate([[5, 6]], params)[0]
    assert (output.token_ids, output.finish_reason) == (tokens, reason)
    assert len(model.batches) == 1 and model.cache.lengths == [0] * 8


def test_the_context_ends_within_a_step(model) -> None:
    model.scripts[(5, 6)] = [7, 8, 9, 10]
    llm = LLM(model, max_model_len=4)
    draft(llm, lambda request: [7, 8, 9])
    output = llm.generate([[5, 6]], SamplingParams(temperature=0.0))[0]
    assert (output.token_ids, output.finish_reason) == ([7, 8], "length")


def test_a_stop_string_ends_the_text_within_a_step(model, text_folder) -> None:
    model.config = type(model)(TEXT_VOCAB).config
    llm = LLM(model, folder=text_folder)
    ids = llm.tokenizer.encode("cat! mat. sat")
    model.scripts[(5, 6)] = ids
    draft(llm, lambda request: ids[:-1])
    events = list(llm.stream([5, 6], SamplingParams(temperature=0.0, stop=".")))
    (event,) = events
    assert event.text == "cat! mat" and event.finish_reason == "stop"
    assert event.token_ids == ids[: len(event.token_ids)] and len(event.token_ids) < len(ids)


def test_the_first_draft_that_was_sampled_otherwise_ends_what_stands() -> None:
    sampled = [SampledToken(token) for token in (7, 8, 9)]
    assert verified(sampled, (7, 8)) == sampled
    assert verified(sampled, (7, 5)) == sampled[:2]
    assert verified(sampled, (5, 8)) == sampled[:1]
    assert verified(sampled[:1], ()) == sampled[:1]


def test_a_cache_that_cannot_take_tokens_back_is_not_asked_to(model, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = LLM(model).generate([[5, 6]], GREEDY)
    monkeypatch.delattr(type(model.cache), "truncate")
    for wrong in (None, 1):
        llm = LLM(model)
        draft(llm, drafts_of(plain, 3, wrong))
        if wrong is None:
            assert llm.generate([[5, 6]], GREEDY)[0].token_ids == plain[0].token_ids
        else:
            with pytest.raises(AssertionError, match="a cache that can take them back"):
                llm.generate([[5, 6]], GREEDY)
