"""Drafts of the MTP block: the same tokens and bits as without, whoever drafts, and drafts that are the block's own."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.engine import LLM, RequestOutput, SamplingParams
from dsv4.engine.draft_length import FixedLength
from dsv4.engine.request import Request
from dsv4.engine.speculative import MTPDrafter, SpeculationStats, Speculator
from dsv4.engine.step import ScheduledChunk
from dsv4.kernels import backends
from dsv4.model.batch import RaggedBatch
from dsv4.model.transformer import Transformer

from ..model.tiny import random_model
from .conftest import HistoryModel
from .prefixes import CONFIG, IDS, STRICT_MKL, assert_nothing_leaks, cache_of, greedy, same, sampled

BITS = STRICT_MKL or backends.native_module() is not None
LENGTHS = (1, 2, 3, 5, 124, 126, 128, 131)
PROMPTS = [IDS[40 * i : 40 * i + length] for i, length in enumerate(LENGTHS)]
PARAMS = [
    greedy(14),
    sampled(1, 11),
    sampled(2, 14, temperature=0.6, top_p=0.8),
    sampled(3, 13, min_p=0.05),
    greedy(12, presence_penalty=1.0, frequency_penalty=0.5),
    sampled(4, 14, top_k=5, logit_bias={3: 2.0, 9: -50.0}),
    greedy(14, stop_token_ids=(5,)),
    sampled(6, 12, temperature=1.3),
]


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(CONFIG)


def drafting(model: Transformer | None, length: int, **options: Any) -> LLM:
    """An engine that always drafts `length` tokens."""
    llm = LLM(model, speculate=length, **options)
    speculator_of(llm).lengths = FixedLength(length)
    return llm


def speculator_of(llm: LLM) -> Speculator:
    assert llm.core.speculator is not None
    return llm.core.speculator


class Oracle:
    """Drafts known outputs: all right, all wrong, or each right with a probability. Checks what it is told."""

    def __init__(self, outputs: list[RequestOutput], share: float, vocab: int) -> None:
        self.known = {tuple(output.prompt_token_ids): output.token_ids for output in outputs}
        self.share, self.vocab, self.random = share, vocab, random.Random(0)

    def take_in(self, chunks: Sequence[ScheduledChunk], streams: Tensor) -> None:
        assert len(streams) == sum(chunk.num_tokens for chunk in chunks)

    def catch_up(self, request: Request) -> None:
        pass

    def propose(self, wanted: Mapping[Request, int]) -> dict[Request, list[int]]:
        drafts = {}
        for request, count in wanted.items():
            done = len(request.output.token_ids)
            right = self.known.get(tuple(request.prompt_token_ids), [])[done : done + count]
            drafts[request] = [
                token if self.random.random() < self.share else (token + 1) % self.vocab for token in right
            ]
        return drafts


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_the_output_is_the_same(model: Transformer, length: int) -> None:
    """Alone and beside others, in chunks of any size, from the start and from stored prefixes."""
    want = LLM(model, enable_prefix_caching=False).generate(PROMPTS, PARAMS)
    for options in ({}, {"max_num_seqs": 3, "max_num_batched_tokens": 9}):
        llm = drafting(model, length, **options)
        for _ in range(2):
            assert same(llm.generate(PROMPTS, PARAMS), want)
        stats = speculator_of(llm).stats
        assert stats.num_drafts and stats.num_accepted_tokens
        assert_nothing_leaks(llm)
    llm = drafting(model, length, max_num_seqs=1)
    for prompt, params, output in list(zip(PROMPTS, PARAMS, want, strict=True))[::3]:
        assert same(llm.generate([prompt], params), [output])


@pytest.mark.parametrize(("numerics", "length"), [("float", 1), ("float", 3), ("shipped", 2)])
def test_the_output_of_the_embedded_model_is_the_same(numerics: str, length: int) -> None:
    text = "The quick brown fox jumps over the lazy dog. "
    prompts: list[str | list[int]] = [text, text * 5, "1 + 2 = ", "List: "]
    params = [
        greedy(24),
        sampled(1, 24, stop="o"),
        dataclasses.replace(sampled(2, 24), regex=r"[0-9]{3,9}(, [a-z]{2,4})*"),
        dataclasses.replace(greedy(24), choice=("one, two", "three", "four")),
    ]
    want = LLM(numerics=numerics).generate(prompts, params)
    llm = drafting(None, length, numerics=numerics)
    for _ in range(2):
        got = llm.generate(prompts, params)
        assert same(got, want) and [o.text for o in got] == [o.text for o in want]
    assert_nothing_leaks(llm)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("length", [1, 3, 7])
def test_no_drafter_changes_the_output(model: Transformer, length: int, share: float) -> None:
    want = LLM(model).generate(PROMPTS, PARAMS)
    llm = drafting(model, length)
    speculator_of(llm).drafter = Oracle(want, share, CONFIG.vocab_size)
    got = llm.generate(PROMPTS, PARAMS)
    assert same(got, want)
    stats = speculator_of(llm).stats
    if share in (0.0, 1.0):
        assert stats.num_accepted_tokens == share * stats.num_draft_tokens
        assert all(output.num_accepted_tokens == share * output.num_draft_tokens for output in got)
    assert sum(output.num_draft_tokens for output in got) == stats.num_draft_tokens
    assert sum(output.num_accepted_tokens for output in got) == stats.num_accepted_tokens
    assert_nothing_leaks(llm)


def test_events_say_which_tokens_were_drafted(model: Transformer) -> None:
    """Up to the end, where an accepted draft may be the last token of all."""
    [plain] = LLM(model).generate([PROMPTS[1]], [greedy(9)])
    llm = drafting(model, 3)
    speculator_of(llm).drafter = Oracle([plain], 1.0, CONFIG.vocab_size)
    stop = plain.token_ids[6]
    end = plain.token_ids.index(stop)
    params = dataclasses.replace(greedy(9), stop_token_ids=(stop,))
    events = list(llm.stream(PROMPTS[1], params))
    assert [len(event.token_ids) for event in events] == [1, *[4] * (end // 4), *([end % 4] if end % 4 else [])]
    counts = [event.num_accepted_tokens for event in events]
    assert counts == [0, *[3] * (end // 4), *([end % 4] if end % 4 else [])]
    timings = events[-1].timings
    assert timings is not None and timings.num_accepted_tokens == sum(counts) <= timings.num_draft_tokens


def test_drafts_count_as_served(model: Transformer) -> None:
    """Two users take turns in one row; the drafts of one are all kept."""
    prompts = dict(zip("ab", PROMPTS[:2], strict=True))
    params = greedy(200)
    want = LLM(model, max_model_len=1024).generate([prompts["a"]], params)
    llm = drafting(model, 7, max_model_len=1024, max_num_seqs=1, time_slice=8, enable_prefix_caching=False)
    speculator_of(llm).drafter = Oracle(want, 1.0, CONFIG.vocab_size)
    requests = {
        user: [llm.core.new_request(prompt, params, (user,)) for _ in range(6)] for user, prompt in prompts.items()
    }
    for pair in zip(*requests.values(), strict=True):
        for request in pair:
            llm.core.add(request)
    for _ in range(240):
        llm.core.step()
    tokens = {user: sum(len(request.output.token_ids) for request in each) for user, each in requests.items()}
    assert max(tokens.values()) < 2 * min(tokens.values())
    llm.core.abort_all()
    assert_nothing_leaks(llm)


@pytest.mark.parametrize(("length", "share"), [(1, 1.0), (3, 1.0), (3, 0.0)])
@pytest.mark.parametrize("caching", [True, False])
def test_giving_way_changes_nothing(model: Transformer, length: int, share: float, caching: bool) -> None:
    """Two answers that need three pages each, in a pool of five."""
    prompts, params = [IDS[:120], IDS[200:320]], [greedy(145), sampled(1, 145)]
    want = LLM(model, enable_prefix_caching=False).generate(prompts, params)
    llm = drafting(model, length, num_pages=5, max_model_len=512, enable_prefix_caching=caching)
    speculator_of(llm).drafter = Oracle(want, share, CONFIG.vocab_size)
    assert same(llm.generate(prompts, params), want)
    assert llm.core.scheduler.cache_manager.num_preemptions
    assert_nothing_leaks(llm)
    llm = drafting(model, length, num_pages=5, max_model_len=512, enable_prefix_caching=caching)
    assert same(llm.generate(prompts, params), want)
    assert_nothing_leaks(llm)


def test_drafts_evict_no_stored_prefix(model: Transformer) -> None:
    """All pages are in use, and wrong drafts reach beyond the page that the answer's own tokens still fit into."""
    prompt = IDS[:120]
    want = LLM(model, enable_prefix_caching=False).generate([prompt], greedy(30))
    llm = drafting(model, 7, num_pages=6, max_model_len=512)
    speculator_of(llm).drafter = Oracle(want, 0.0, CONFIG.vocab_size)
    llm.generate([IDS[200:450]], greedy(1))
    prefixes = llm.core.scheduler.cache_manager.prefixes
    assert prefixes is not None
    stored, request = set(prefixes._entries), llm.core.new_request(prompt, greedy(30))
    llm.core.add(request)
    while request.num_computed_tokens < 128:
        llm.core.step()
        assert stored <= set(prefixes._entries)
    assert len(stored) == 2 and cache_of(llm).num_free_pages == 0 and speculator_of(llm).stats.num_drafts
    llm.core.abort(request)
    assert_nothing_leaks(llm)


def record_drafts(llm: LLM) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(tokens so far, drafts) of every chunk that is scheduled with drafts, in order."""
    found: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    schedule = llm.core.scheduler.schedule

    def recorded() -> list[ScheduledChunk]:
        chunks = schedule()
        found.extend((tuple(c.request.tokens(0, c.stop)), c.draft_token_ids) for c in chunks if c.draft_token_ids)
        return chunks

    llm.core.scheduler.schedule = recorded  # type: ignore[method-assign]
    return found


def drafts_without_cache(model: Transformer, tokens: Sequence[int], count: int) -> list[int]:
    """The block's greedy drafts, computed from the whole sequence."""
    with torch.inference_mode():
        streams = model.forward_ragged(RaggedBatch.pack([list(tokens)]))[:-1]
        ids, drafts = list(tokens), []
        for _ in range(count):
            batch = RaggedBatch.pack([ids[1:]])
            out = model.mtp_forward(streams, batch.token_ids, batch)
            drafts.append(int(model.mtp_logits(out[-1:]).argmax()))
            ids.append(drafts[-1])
            streams = torch.cat([streams, out[-1:]])
    return drafts


def test_the_native_block_is_the_definition(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Projections of its inputs, layer and read-out, up to rounding, with both numerics."""
    for numerics, tolerance in (("float", 1e-4), ("shipped", 0.2)):
        native = random_model(CONFIG, numerics=numerics)
        with monkeypatch.context() as patch:
            patch.setattr(backends, "native_module", lambda: None)
            plain = random_model(CONFIG, numerics=numerics)
        batch = RaggedBatch.pack([IDS[:150], IDS[200:201]])
        streams = torch.randn(151, CONFIG.hc_mult, CONFIG.hidden_size, generator=torch.Generator().manual_seed(0))
        given = streams.clone()
        with torch.inference_mode():
            got, want = (m.mtp_forward(streams, batch.token_ids, batch) for m in (native, plain))
        assert torch.equal(streams, given), "the inputs stay"
        assert float((got - want).abs().median()) < tolerance and torch.allclose(got, want, atol=10 * tolerance)


@pytest.mark.parametrize("budget", [1024, 50])
def test_drafts_are_those_of_the_whole_sequence(model: Transformer, budget: int) -> None:
    """Also from a stored prefix, after giving way, and for a row that was another's before."""
    prompts, params = [IDS[:5], IDS[300:420], IDS[600:900]], greedy(20)
    llm = drafting(model, 3, max_num_batched_tokens=budget, max_num_seqs=2)
    found = record_drafts(llm)
    for _ in range(2):
        llm.generate(prompts, params)
    assert len(found) > 60
    for tokens, drafts in found[::7]:
        assert drafts == tuple(drafts_without_cache(model, tokens, 3))[: len(drafts)], len(tokens)


def test_a_request_that_gave_way_drafts_on(model: Transformer) -> None:
    prompts = [IDS[:120], IDS[200:320]]
    llm = drafting(model, 2, num_pages=5, max_model_len=512)
    found = record_drafts(llm)
    llm.generate(prompts, greedy(145))
    assert llm.core.scheduler.cache_manager.num_preemptions
    for tokens, drafts in found[-40:]:
        assert drafts == tuple(drafts_without_cache(model, tokens, 2))[: len(drafts)]


def test_no_more_drafts_than_a_request_can_use(model: Transformer) -> None:
    for params, options in ((greedy(6), {}), (greedy(100), {"max_model_len": 14})):
        (want,) = LLM(model, **options).generate([IDS[:8]], params)
        llm = drafting(model, 4, **options)
        speculator_of(llm).drafter = Oracle([want], 1.0, CONFIG.vocab_size)
        found = record_drafts(llm)
        assert same(llm.generate([IDS[:8]], params), [want])
        assert [len(drafts) for _, drafts in found] == [4], "the first token, then five, of which four were drafted"


def test_drafts_leave_half_of_a_step_to_prompts(model: Transformer) -> None:
    llm = drafting(model, 7, max_num_batched_tokens=9, max_num_seqs=2)
    sizes = []
    run = llm.core.runner.run

    def noted(chunks: list[ScheduledChunk]):
        sizes.append((sum(c.num_tokens for c in chunks), sum(len(c.draft_token_ids) for c in chunks)))
        return run(chunks)

    llm.core.runner.run = noted  # type: ignore[method-assign]
    llm.generate([IDS[:20], IDS[50:130]], greedy(30))
    assert max(total for total, _ in sizes) <= 9 and max(drafts for _, drafts in sizes) == 4


def test_what_an_answer_leaves_is_stored_without_drafts(model: Transformer) -> None:
    """Ended by its length, by a stop token in the middle of right drafts, and cancelled."""
    prompt = IDS[:130]
    (want,) = LLM(model).generate([prompt], greedy(20))
    stop = want.token_ids[9]
    for params in (greedy(20), greedy(20, stop_token_ids=(stop,))):
        llm = drafting(model, 4)
        speculator_of(llm).drafter = Oracle([want], 1.0, CONFIG.vocab_size)
        (first,) = llm.generate([prompt], params)
        llm.core.speculator = None
        turn = [*prompt, *first.token_ids, *IDS[500:520]]
        again = llm.generate([turn], greedy())
        assert again[0].cached_tokens == len(prompt) + len(first.token_ids) - 1
        assert same(again, LLM(model, enable_prefix_caching=False).generate([turn], greedy()))
    llm = drafting(model, 4)
    speculator_of(llm).drafter = Oracle([want], 0.5, CONFIG.vocab_size)
    stream = llm.stream(prompt, greedy(20))
    taken = [token for _ in range(3) for token in next(stream).token_ids]
    stream.close()
    turn = [*prompt, *taken, *IDS[500:520]]
    again = llm.generate([turn], greedy(4))
    assert again[0].cached_tokens == len(prompt) + len(taken) - 1
    assert same(again, LLM(model, enable_prefix_caching=False).generate([turn], greedy(4)))


def test_a_state_stored_without_the_blocks_gets_it(model: Transformer) -> None:
    prompt = IDS[:130]
    llm = drafting(model, 2)
    speculator_of(llm).lengths = FixedLength(0)
    (first,) = llm.generate([prompt], greedy(140))
    prefixes = llm.core.scheduler.cache_manager.prefixes
    assert prefixes is not None and all(entry.snapshot.mtp_streams is None for entry in prefixes._entries)
    speculator_of(llm).lengths = FixedLength(2)
    assert same(llm.generate([prompt], greedy(140)), [first])
    end = next(entry for entry in prefixes._entries if entry.length == len(prompt) + 139)
    assert end.snapshot.mtp_streams is not None
    turn = [*prompt, *first.token_ids, *IDS[500:520]]
    uncached = drafting(model, 2, enable_prefix_caching=False)
    drafts = [record_drafts(each) for each in (llm, uncached)]
    got = llm.generate([turn], greedy(20))
    assert got[0].cached_tokens == end.length and same(got, uncached.generate([turn], greedy(20)))
    assert not BITS or drafts[0] == drafts[1]
    assert_nothing_leaks(llm)


def test_a_broken_block_drafts_nothing(model: Transformer) -> None:
    broken = random_model(CONFIG)
    with torch.no_grad():
        broken.mtp[0].norm.weight.fill_(float("nan"))
    llm = drafting(broken, 3)
    assert same(llm.generate(PROMPTS, PARAMS), LLM(model).generate(PROMPTS, PARAMS))
    assert speculator_of(llm).stats == SpeculationStats()


def test_sampled_tokens_have_the_distribution_of_the_model(model: Transformer) -> None:
    """Of the second token, the first one that a draft may have stood for, over 600 seeds."""
    prompt, count = IDS[:9], 600
    with torch.inference_mode():
        first = model(torch.tensor([prompt]))[0, -1].softmax(-1)
        rows = model(torch.tensor([[*prompt, token] for token in range(CONFIG.vocab_size)]))[:, -1].softmax(-1)
    expected = (first @ rows).double() * count
    llm = drafting(model, 2, max_num_seqs=8)
    params = SamplingParams(seed=0, max_tokens=3, ignore_eos=True, n=count)
    outputs = llm.generate([prompt], params)[0].outputs
    found = torch.bincount(torch.tensor([output.token_ids[1] for output in outputs]), minlength=CONFIG.vocab_size)
    assert speculator_of(llm).stats.num_accepted_tokens > 30
    large = expected >= 5
    pairs = [(found[large], expected[large]), (found[~large].sum()[None], expected[~large].sum()[None])]
    chi_square = sum(float(((f - e) ** 2 / e).sum()) for f, e in pairs if float(e.sum()))
    freedom = int(large.sum())
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5


def test_counts_are_those_of_vllm() -> None:
    stats = SpeculationStats()
    for proposed, accepted in ((3, 0), (3, 2), (1, 1)):
        stats.count(proposed, accepted)
    assert dataclasses.astuple(stats) == (3, 7, 3, [3, 2, 2], [2, 1, 0])
    assert stats.acceptance_rate_per_pos == [2 / 3, 0.5, 0.0]


@pytest.fixture
def without_mtp() -> Iterator[Transformer]:
    config = dataclasses.replace(CONFIG, num_nextn_predict_layers=0, compress_ratios=CONFIG.compress_ratios[:-1])
    yield random_model(config)


def test_a_model_that_cannot_draft_is_told(without_mtp: Transformer) -> None:
    with pytest.raises(ValueError, match=r"speculate is 2, but the model has no MTP block .* allowed: 0"):
        LLM(without_mtp, speculate=2)
    with pytest.raises(ValueError, match="speculate is 1; a HistoryModel cannot draft"):
        LLM(HistoryModel(), speculate=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"speculate is 8; allowed: \[0, 7\] draft tokens"):
        LLM(without_mtp, speculate=8)
    assert cache_of(LLM(without_mtp)).mtp is None


def test_drafts_after_a_replay_are_those_after_a_miss(model: Transformer, tmp_path: Path) -> None:
    """And so are the block's streams that they are chosen from."""

    def run(llm: LLM) -> tuple[RequestOutput, list[tuple[Tensor, list[int | None]]]]:
        drafter, found = speculator_of(llm).drafter, list[tuple[Tensor, list[int | None]]]()
        assert isinstance(drafter, MTPDrafter)
        choose = drafter._choose

        def record(streams: Tensor, *arguments: Any) -> list[int | None]:
            drafts = choose(streams, *arguments)
            found.append((streams.clone(), drafts))
            return drafts

        drafter._choose = record  # type: ignore[method-assign]
        (output,) = llm.generate([IDS[:1000]], greedy(30))
        llm.close()
        return output, found

    want, drafts = run(drafting(model, 2, enable_prefix_caching=False))
    run(drafting(model, 2, cache_dir=tmp_path, cache_window="zero"))
    got, after_hit = run(drafting(model, 2, cache_dir=tmp_path, cache_window="zero"))
    assert got.cached_tokens == 1000 // 128 * 128 - (CONFIG.num_hidden_layers + 1) * 128
    assert same([got], [want])
    if BITS:
        assert [tokens for _, tokens in after_hit] == [tokens for _, tokens in drafts] and len(drafts) > 10
        assert all(torch.equal(a, b) for (a, _), (b, _) in zip(after_hit, drafts, strict=True))


def test_a_bfloat16_engine_on_the_cpu_drafts() -> None:
    """NumPy has no BF16, and streams are kept by it."""
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    plain = LLM(dtype="bfloat16", max_model_len=512)
    drafts = drafting(None, 2, dtype="bfloat16", max_model_len=512)
    prompt = [5, 9, 300, 7]
    assert drafts.generate([prompt], params)[0].token_ids == plain.generate([prompt], params)[0].token_ids
    assert speculator_of(drafts).stats.num_draft_tokens > 0
