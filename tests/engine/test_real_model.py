"""The engine over a real model with random weights: tokens and log-probabilities equal the model's own."""

from itertools import accumulate
from pathlib import Path

import pytest
import torch

import dsv4
from dsv4.cache import Cache
from dsv4.checkpoint import save_model
from dsv4.config import ModelConfig
from dsv4.engine import LLM, SamplingParams
from dsv4.engine.runner import ModelRunner
from dsv4.engine.step import ScheduledChunk, StepOutput
from dsv4.kernels import backends
from dsv4.model.batch import RaggedBatch
from dsv4.model.transformer import Transformer
from dsv4.tokenizer.train import train_tokenizer, write_tokenizer

VOCAB = 300


@pytest.fixture(scope="module")
def transformer() -> Transformer:
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "num_attention_heads": 2,
        "head_dim": 128,
        "q_lora_rank": 64,
        "o_groups": 1,
        "o_lora_rank": 64,
        "n_routed_experts": 8,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_hash_layers": 1,
        "compress_ratios": [0, 4, 128, 0],
        "index_topk": 8,
        "max_position_embeddings": 4096,
    }
    model = Transformer(ModelConfig.from_dict(ModelConfig.preset("nano").to_dict() | shape))
    model.init_weights(torch.Generator().manual_seed(1))
    # Sharper logits than a fresh model's, so that a wrong row cannot sample the right token by luck.
    with torch.no_grad():
        model.head.weight.mul_(8.0)
    return model.eval()


@pytest.fixture(scope="module")
def folder(transformer: Transformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    save_model(transformer, transformer.config, path, format="fp32")
    write_tokenizer(train_tokenizer(iter(["the cat sat on the mat"] * 4), VOCAB), path)
    return path


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(2, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def test_logprobs_equal_the_log_softmax_of_the_model(transformer) -> None:
    batch = prompts(3, 130, 17)
    params = SamplingParams(max_tokens=9, temperature=0.7, seed=4, logprobs=3, ignore_eos=True)
    outputs = LLM(transformer, max_num_batched_tokens=40).generate(batch, params)
    for prompt, output in zip(batch, outputs, strict=True):
        with torch.no_grad():
            expected = transformer(torch.tensor([prompt + output.token_ids]))[0].log_softmax(-1)
        rows = expected[len(prompt) - 1 : -1]
        sampled = rows.gather(1, torch.tensor(output.token_ids)[:, None])[:, 0]
        assert torch.allclose(torch.tensor(output.logprobs), sampled, atol=1e-5)
        assert [[i for i, _ in step] for step in output.top_logprobs] == rows.topk(3).indices.tolist()


def test_greedy_tokens_and_logprobs_do_not_depend_on_the_batch_or_the_chunking(transformer) -> None:
    batch = prompts(1, 5, 127, 131, 64, 9, 2)
    params = SamplingParams(max_tokens=8, temperature=0.0, logprobs=True, ignore_eos=True)
    alone = [LLM(transformer, max_num_seqs=1).generate([prompt], params)[0] for prompt in batch]
    for num_seqs, budget in ((7, 1024), (3, 5), (2, 129)):
        together = LLM(transformer, max_num_seqs=num_seqs, max_num_batched_tokens=budget).generate(batch, params)
        assert [o.token_ids for o in together] == [o.token_ids for o in alone]
        assert [o.logprobs for o in together] == [o.logprobs for o in alone], "not the same bits"


def test_an_engine_that_keeps_streams_has_the_bits_of_one_that_does_not(transformer, monkeypatch) -> None:
    batch = prompts(130, 70, 66)
    params = SamplingParams(max_tokens=4, temperature=0.0, logprobs=True, ignore_eos=True)
    plain = LLM(transformer, max_num_batched_tokens=64).generate(batch, params)
    llm = LLM(transformer, max_num_batched_tokens=64)
    core, steps = llm.core, []
    runner = ModelRunner(transformer, core.runner.cache, torch.device("cpu"), keep_streams=True)

    def run(chunks: list[ScheduledChunk]) -> StepOutput:
        histories = [c.request.tokens(0, c.stop) for c in chunks if c.num_samples]
        ends = accumulate(chunk.num_tokens for chunk in chunks)
        last = [end - 1 for chunk, end in zip(chunks, ends, strict=True) if chunk.num_samples]
        steps.append((histories, last, runner.run(chunks)))
        return steps[-1][2]

    monkeypatch.setattr(core.runner, "run", run)
    kept = llm.generate(batch, params)
    assert [(o.token_ids, o.logprobs) for o in kept] == [(o.token_ids, o.logprobs) for o in plain]
    assert not steps[0][0] and steps[0][2].streams.shape == (64, 4, 64), "a step of prompts that are read in part"
    for histories, last, output in steps:
        for history, logits, streams in zip(histories, output.logits, output.streams[last], strict=True):
            with torch.inference_mode():
                torch.testing.assert_close(streams, transformer.forward_ragged(RaggedBatch.pack([history]))[-1])
                torch.testing.assert_close(logits, transformer.logits(streams[None])[0])


def test_sampled_tokens_do_not_depend_on_the_batch(transformer) -> None:
    batch = prompts(4, 33, 6)
    params = [SamplingParams(max_tokens=12, seed=i, top_p=0.95, ignore_eos=True) for i in range(3)]
    together = LLM(transformer).generate(batch, params)
    alone = [LLM(transformer).generate([p], s)[0] for p, s in zip(batch, params, strict=True)]
    assert [o.token_ids for o in together] == [o.token_ids for o in alone]


def test_a_cache_row_that_served_before_gives_the_same_tokens(transformer) -> None:
    llm = LLM(transformer, max_num_seqs=1)
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    long, short = prompts(150, 7)
    fresh = llm.generate([short], params)[0].token_ids
    llm.generate([long], params)
    assert llm.generate([short], params)[0].token_ids == fresh


def test_text_prompts_begin_with_the_beginning_of_a_sentence(folder) -> None:
    llm = dsv4.LLM(folder)
    params = SamplingParams(max_tokens=7, temperature=0.0, ignore_eos=True)
    output = llm.generate(["the cat <｜User｜>"], params)[0]
    assert output.prompt_token_ids == [0, *llm.tokenizer.encode("the cat <｜User｜>")]
    special = llm.tokenizer.special_tokens["<｜User｜>"]
    assert special not in output.prompt_token_ids, "special spellings in text stay text"
    assert output.text == llm.tokenizer.decode(output.token_ids)
    assert llm.generate([output.prompt_token_ids], params)[0].token_ids == output.token_ids
    with pytest.raises(ValueError, match="empty text"):
        llm.generate([""])


def test_a_stop_string_across_tokens_ends_the_text_before_it(folder) -> None:
    llm = LLM(folder)
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=3, ignore_eos=True)
    whole = llm.generate(["the mat"], params)[0]
    ascii_runs = [run for run in whole.text.split("\ufffd") if len(run) >= 3]
    stop = max(ascii_runs, key=len)[1:3]
    stopped = llm.generate(["the mat"], SamplingParams(max_tokens=40, seed=3, ignore_eos=True, stop=[stop]))[0]
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)
    assert stopped.token_ids == whole.token_ids[: len(stopped.token_ids)]
    assert len(stopped.token_ids) < 40
    pieces = [event.text for event in llm.stream("the mat", SamplingParams(max_tokens=40, seed=3, stop=stop))]
    assert "".join(pieces) == stopped.text


def test_a_folder_without_a_tokenizer_takes_ids_and_refuses_text(folder, transformer, tmp_path) -> None:
    save_model(transformer, transformer.config, tmp_path / "bare", format="fp32")
    bare = LLM(tmp_path / "bare")
    params = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
    output = bare.generate(prompts(6), params)[0]
    assert output.token_ids == LLM(folder).generate(prompts(6), params)[0].token_ids
    assert output.text == ""
    with pytest.raises(ValueError, match=r"bare has no tokenizer, so a prompt must be a list of token ids, not text"):
        bare.generate(["text"])


def test_an_engine_whose_cache_grows_gives_the_same_tokens(transformer, monkeypatch) -> None:
    """As on a GPU: slots are filled, freed and reused while the entries move."""
    monkeypatch.setattr(backends, "native_module", lambda: None)
    batch = prompts(3, 130, 1500, 17, 600, 40)
    params = SamplingParams(max_tokens=6, temperature=0.0, logprobs=True, ignore_eos=True)
    want = LLM(transformer, max_num_seqs=3, max_num_batched_tokens=256).generate(batch, params)

    def new_cache(self: Transformer, batch_size: int, max_tokens: int, *_: object) -> Cache:
        return Cache(self.config, batch_size, max_tokens, self.device, self.dtype, grows=True)

    monkeypatch.setattr(Transformer, "new_cache", new_cache)
    llm = LLM(transformer, max_num_seqs=3, max_num_batched_tokens=256)
    assert llm.core.runner.cache.num_pages == 0
    for _ in range(2):
        got = llm.generate(batch, params)
        assert [(o.token_ids, o.logprobs) for o in got] == [(o.token_ids, o.logprobs) for o in want]
