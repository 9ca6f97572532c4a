from dataclasses import replace

import pytest
import torch

from dsv4.engine import LLM, SamplingParams
from dsv4.engine.sampler import output_seed
from dsv4.engine.sampling_params import MAX_SEED

from .conftest import TEXT_VOCAB, HistoryModel

EOS = 1
GREEDY = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)


def greedy_by_hand(model, prompt: list[int], steps: int) -> list[int]:
    history = list(prompt)
    for _ in range(steps):
        history.append(int(model.expected_logits(history).argmax()))
    return history[len(prompt) :]


def prompts(lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(2, 53, (length,), generator=generator).tolist() for length in lengths]


def test_a_prompt_that_fills_the_context_gets_one_token(model) -> None:
    output = LLM(model, max_model_len=10).generate([[5] * 10], SamplingParams(max_tokens=99, ignore_eos=True))[0]
    assert len(output.token_ids) == 1 and output.finish_reason == "length"


def test_greedy_follows_the_model_whatever_shares_the_batch(model) -> None:
    batch = prompts([5, 1, 33, 4, 128, 7, 2])
    outputs = LLM(model, max_num_seqs=3, max_num_batched_tokens=11).generate(batch, GREEDY)
    assert [output.token_ids for output in outputs] == [greedy_by_hand(model, prompt, 9) for prompt in batch]
    assert [output.prompt_token_ids for output in outputs] == batch
    assert {output.finish_reason for output in outputs} == {"length"}


@pytest.mark.parametrize("budget", [1, 3, 4, 127, 1024])
def test_every_chunking_gives_the_same_samples(model, budget: int) -> None:
    params = SamplingParams(temperature=1.0, top_p=0.9, seed=11, max_tokens=6, ignore_eos=True)
    prompt = prompts([129])[0]
    expected = LLM(model).generate([prompt], params)[0].token_ids
    assert LLM(model, max_num_seqs=1, max_num_batched_tokens=budget).generate([prompt], params)[0].token_ids == expected
    assert all(sum(count for _, _, count in step) <= budget for step in model.batches[6:])


def test_a_seed_gives_the_same_tokens_alone_and_in_company(model) -> None:
    batch = prompts([4, 9, 6, 5])
    params = [SamplingParams(seed=i, max_tokens=12, ignore_eos=True) for i in range(4)]
    together = LLM(model, max_num_seqs=2).generate(batch, params)
    reverse = LLM(model, max_num_seqs=4).generate(batch[::-1], params[::-1])[::-1]
    alone = [LLM(model).generate([prompt], param)[0] for prompt, param in zip(batch, params, strict=True)]
    assert [o.token_ids for o in together] == [o.token_ids for o in reverse] == [o.token_ids for o in alone]


def test_without_a_seed_two_runs_differ(model) -> None:
    llm = LLM(model)
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    assert llm.generate([[3, 4]], params)[0].token_ids != llm.generate([[3, 4]], params)[0].token_ids


def test_the_end_of_sentence_token_ends_the_request_and_is_reported(model) -> None:
    model.scripts[(5, 6)] = [7, 8, EOS, 9]
    output = LLM(model).generate([[5, 6]], SamplingParams(temperature=0.0))[0]
    assert (output.token_ids, output.finish_reason, output.stop_reason) == ([7, 8, EOS], "stop", EOS)
    ignoring = LLM(model).generate([[5, 6]], SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=4))[0]
    assert (ignoring.token_ids, ignoring.finish_reason) == ([7, 8, EOS, 9], "length")


def test_every_end_token_of_the_config_ends_a_request(model) -> None:
    model.config = replace(model.config, eos_token_id=(EOS, 9))
    model.scripts |= {(5, 6): [7, 9, 8], (6, 5): [8, EOS, 7]}
    outputs = LLM(model).generate([[5, 6], [6, 5]], SamplingParams(temperature=0.0))
    assert [(o.token_ids, o.finish_reason, o.stop_reason) for o in outputs] == [
        ([7, 9], "stop", 9),
        ([8, EOS], "stop", EOS),
    ]
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=3)
    assert LLM(model).generate([[5, 6]], params)[0].token_ids == [7, 9, 8]


def test_stop_token_ids_end_a_request_as_well(model) -> None:
    model.scripts[(5, 6)] = [7, 8, 9]
    output = LLM(model).generate([[5, 6]], SamplingParams(temperature=0.0, stop_token_ids=(8,)))[0]
    assert (output.token_ids, output.stop_reason) == ([7, 8], 8)


def test_logprobs_are_the_models_own(model) -> None:
    prompt = [9, 8, 7]
    output = LLM(model).generate([prompt], SamplingParams(seed=3, max_tokens=5, logprobs=4, ignore_eos=True))[0]
    history = list(prompt)
    for token, logprob, alternatives in zip(output.token_ids, output.logprobs, output.top_logprobs, strict=True):
        expected = model.expected_logits(history).log_softmax(-1)
        assert logprob == pytest.approx(float(expected[token]), abs=1e-6)
        assert [i for i, _ in alternatives] == expected.topk(4).indices.tolist()
        history.append(token)


def test_logprobs_are_empty_unless_asked_for(model) -> None:
    assert LLM(model).generate([[4]], GREEDY)[0].logprobs == []


def test_a_request_ends_at_the_context_limit(model) -> None:
    output = LLM(model, max_model_len=10).generate([[5, 6, 7]], SamplingParams(max_tokens=99, ignore_eos=True))[0]
    assert (len(output.token_ids), output.finish_reason) == (7, "length")


def test_every_cache_row_is_emptied_for_its_next_sequence(model) -> None:
    llm = LLM(model, max_num_seqs=2)
    llm.generate(prompts([3, 4, 5, 6, 7]), GREEDY)
    assert sorted(set(model.cache.resets)) == [0, 1] and len(model.cache.resets) == 5
    assert model.cache.lengths == [0, 0]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty"),
        ([3] * 21, "21 tokens; the limit is max_model_len = 20"),
        ([3, 53], r"token id 53 at position 1 is outside \[0, 52\]"),
        ([-1], r"token id -1 at position 0 is outside \[0, 52\]"),
        ("text", "no tokenizer, so a prompt must be a list of token ids"),
    ],
)
def test_a_prompt_that_cannot_run_is_refused_before_anything_runs(model, prompt, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLM(model, max_model_len=20).generate([[4, 5], prompt])
    assert model.batches == []


def test_half_a_surrogate_pair_is_named_with_its_prompt(model, text_folder) -> None:
    model.config = type(model)(300).config
    llm = LLM(model, folder=text_folder)
    with pytest.raises(ValueError, match=r"prompt 1: character 2 is U\+D800, half of a surrogate pair"):
        llm.generate(["good", "ab\ud800"])
    with pytest.raises(ValueError, match="the prompt: character 0 is U"):
        next(llm.stream("\udfff"))
    with pytest.raises(ValueError, match=r"SamplingParams.stop\[0\]: character 0 is U\+D800"):
        SamplingParams(stop="\ud800")
    assert model.batches == []


def test_stop_strings_need_a_tokenizer(model) -> None:
    with pytest.raises(ValueError, match=r"stop strings \('x',\) need a tokenizer"):
        LLM(model).generate([[4]], SamplingParams(stop="x"))


def test_parameters_must_match_the_prompts(model) -> None:
    with pytest.raises(ValueError, match="1 sampling_params for 2 prompts"):
        LLM(model).generate([[4], [5]], [GREEDY])


def test_limits_that_cannot_hold_are_refused(model) -> None:
    with pytest.raises(ValueError, match=r"max_model_len is 5000; allowed: \[2, 4096\]"):
        LLM(model, max_model_len=5000)
    with pytest.raises(ValueError, match="max_num_seqs is 0"):
        LLM(model, max_num_seqs=0)
    with pytest.raises(ValueError, match="max_num_batched_tokens is 3; it must be at least max_num_seqs"):
        LLM(model, max_num_seqs=4, max_num_batched_tokens=3)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("gpu", "device is 'gpu'; allowed: cpu, cuda or cuda:N"),
        ("cuda:99", r"device is 'cuda:99'; torch finds \d+ CUDA devices here"),
    ],
)
def test_a_device_that_is_not_there_is_refused(model, device: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLM(model, device=device)


def test_stream_yields_what_generate_returns_and_closing_it_stops_the_request(model) -> None:
    llm = LLM(model)
    whole = llm.generate([[6, 7]], GREEDY)[0].token_ids
    assert [token for event in llm.stream([6, 7], GREEDY) for token in event.token_ids] == whole
    stream = llm.stream([6, 7], GREEDY)
    next(stream)
    stream.close()
    assert not llm.core.has_work and model.cache.lengths == [0] * 8


def test_a_busy_llm_refuses_a_second_call_instead_of_mixing_them(model) -> None:
    llm = LLM(model)
    stream = llm.stream([6, 7], GREEDY)
    next(stream)
    with pytest.raises(RuntimeError, match="this LLM is busy"):
        llm.generate([[4]], GREEDY)
    stream.close()
    assert llm.generate([[4]], GREEDY)[0].finish_reason == "length"


def test_an_error_in_the_model_leaves_the_engine_clean(model) -> None:
    model.fail_at_step = 2
    llm = LLM(model)
    with pytest.raises(RuntimeError, match="the model broke"):
        llm.generate(prompts([3, 4]), GREEDY)
    model.fail_at_step = None
    assert not llm.core.has_work
    assert llm.generate([[4]], GREEDY)[0].token_ids == greedy_by_hand(model, [4], 9)


def test_a_long_prompt_does_not_hold_up_those_that_decode(model) -> None:
    llm = LLM(model, max_num_seqs=2, max_num_batched_tokens=8)
    core = llm.core
    short = core.new_request([4, 5], SamplingParams(max_tokens=20, ignore_eos=True))
    core.add(short)
    core.step()
    core.add(core.new_request(prompts([50])[0], GREEDY))
    for _ in range(5):
        before = len(short.output.token_ids)
        core.step()
        assert len(short.output.token_ids) == before + 1
    assert [count for _, _, count in model.batches[-1]] == [1, 7]


@pytest.mark.parametrize("prompts", [b"hello", [b"hello"], [bytearray(b"x")]])
def test_bytes_are_not_taken_for_token_ids(model, prompts) -> None:
    with pytest.raises(
        ValueError, match=r"prompt 0 is (bytes|bytearray); allowed: text \(str\), or a list of token ids"
    ):
        LLM(model).generate(prompts)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (None, "prompts is None; allowed: text"),
        (5, "prompts is 5; allowed: text"),
        ({"a": 1}, "prompts is {'a': 1}; allowed: text"),
        ([None], "prompt 0 is None; allowed: text"),
        (["a", 1.5], "prompt 1 is 1.5; allowed: text"),
        ([5, "a"], "prompt 0 is 5; allowed: text"),
        ([[5], [6, 1.5]], "prompt 1 has 1.5 at position 1; allowed: token ids"),
        ([["a"]], "prompt 0 has 'a' at position 0; allowed: token ids"),
        ([[[5]]], r"prompt 0 has \[5\] at position 0; allowed: token ids"),
        ([5, True], "prompt 0 has True at position 1; allowed: token ids"),
        ([[5, None]], "prompt 0 has None at position 1; allowed: token ids"),
    ],
)
def test_what_is_no_prompt_is_refused_by_its_place(text_folder, prompts, message: str) -> None:
    llm = LLM(HistoryModel(TEXT_VOCAB), folder=text_folder)
    with pytest.raises(ValueError, match=message):
        llm.generate(prompts)


def test_the_prompt_of_a_stream_is_checked_too(model) -> None:
    with pytest.raises(ValueError, match=r"the prompt has 1\.5 at position 1; allowed: token ids \(int\)"):
        next(LLM(model).stream([5, 1.5]))  # type: ignore[list-item]


def test_output_i_is_the_same_whatever_n_is(model) -> None:
    llm = LLM(model, max_num_seqs=3)
    params = SamplingParams(seed=11, max_tokens=8, ignore_eos=True)
    one, other = llm.generate([[5, 6], [7]], params)
    for n in (1, 2, 5):
        outputs = llm.generate([[5, 6], [7]], replace(params, n=n))
        assert [len(output.outputs) for output in outputs] == [n, n]
        assert (outputs[0].token_ids, outputs[1].token_ids) == (one.token_ids, other.token_ids)
    five = llm.generate([5, 6], replace(params, n=5))[0]
    two = llm.generate([5, 6], replace(params, n=2))[0]
    assert [output.token_ids for output in two.outputs] == [output.token_ids for output in five.outputs[:2]]
    assert len({tuple(output.token_ids) for output in five.outputs}) == 5
    assert len({output.text for output in five.outputs}) == 1 and five.outputs[0] is five


def test_the_seeds_of_several_outputs_do_not_meet() -> None:
    seeds = [output_seed(seed, index) for seed in range(50) for index in range(50)]
    assert seeds[::50] == list(range(50)) and len(set(seeds)) == len(seeds)
    assert all(0 <= seed <= MAX_SEED for seed in (*seeds, *(output_seed(MAX_SEED, i) for i in range(50))))
    assert output_seed(1, 1) == 4858116031665395457, "fixed for ever"


def test_a_stream_has_one_answer(model) -> None:
    with pytest.raises(ValueError, match=r"SamplingParams.n is 2; allowed: 1 here, any number for LLM.generate"):
        next(LLM(model).stream([5], SamplingParams(n=2)))
    with pytest.raises(ValueError, match=r"SamplingParams.n is 2"):
        LLM(model).core.new_request([5], SamplingParams(n=2))
