import itertools
import math

import numpy as np
import pytest
import torch

from dsv4.engine.sampler import SampleRequest, most_likely, noise_key, output_seed, sample
from dsv4.engine.sampling_params import SamplingParams


def request(seed: int = 0, position: int = 0, **params: object) -> SampleRequest:
    return SampleRequest(SamplingParams(**params), seed, position)  # type: ignore[arg-type]


def test_greedy_takes_the_lower_id_among_equal_logits() -> None:
    logits = torch.zeros(1, 1001)
    logits[0, [17, 400, 999]] = 3.0
    assert sample(logits, [request(temperature=0.0)])[0].token_id == 17


def test_logprobs_are_those_before_temperature_and_filters() -> None:
    logits = torch.randn(1, 37, generator=torch.Generator().manual_seed(1))
    expected = logits[0].log_softmax(-1)
    got = sample(logits, [request(temperature=0.3, top_k=2, logprobs=5)])[0]
    assert got.logprob == pytest.approx(float(expected[got.token_id]), abs=1e-7)
    values, ids = expected.topk(5)
    assert [token for token, _ in got.alternatives] == ids.tolist()
    assert [value for _, value in got.alternatives] == pytest.approx(values.tolist(), abs=1e-7)


def test_logprobs_are_not_computed_unless_asked_for() -> None:
    got = sample(torch.zeros(1, 5), [request(temperature=0.0)])[0]
    assert got.logprob is None and got.alternatives == ()


def test_alternatives_prefer_the_lower_id_among_equals() -> None:
    assert [token for token, _ in most_likely(torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0]), 4)] == [1, 2, 4, 0]


def test_a_tiny_temperature_does_not_overflow() -> None:
    assert sample(torch.tensor([[300.0, 301.0, -300.0]]), [request(temperature=1e-30)])[0].token_id == 1


def test_top_k_may_be_any_number() -> None:
    logits = torch.tensor([[0.0, 1.0, 0.5]])
    assert {sample(logits, [request(seed=i, top_k=2**70)])[0].token_id for i in range(40)} == {0, 1, 2}


@pytest.mark.parametrize("index", [0, 3])
@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.3}])
def test_the_samples_follow_the_distribution(filters: dict[str, float], index: int) -> None:
    """Chi-square over 20 seeds and 200 positions, of a prompt's first output and of its fourth."""
    logits = torch.tensor([[0.05, 0.1, 0.15, 0.3, 0.02, 0.08, 0.3]]).log()
    probs = logits[0].exp().double()
    ranked = sorted(range(7), key=lambda token: (-float(probs[token]), token))
    kept = {"top_k": ranked[:5], "top_p": ranked[:5], "min_p": ranked[:4]}.get(next(iter(filters), ""), ranked)
    expected = 4000 * probs[kept] / probs[kept].sum()
    counts = torch.zeros(7, dtype=torch.float64)
    for seed in range(20):
        requests = [request(output_seed(seed, index), position, **filters) for position in range(200)]
        for token in sample(logits.expand(200, -1), requests):
            counts[token.token_id] += 1
    assert counts.sum() == counts[kept].sum() == 4000
    freedom = len(kept) - 1
    assert float(((counts[kept] - expected) ** 2 / expected).sum()) < freedom + 4 * math.sqrt(2 * freedom) + 4


def test_positions_are_independent() -> None:
    """Pairs of tokens that follow one another, chi-square over the 16 pairs."""
    logits = torch.zeros(4000, 4)
    tokens = [token.token_id for token in sample(logits, [request(7, position) for position in range(4000)])]
    counts = torch.zeros(4, 4)
    for before, after in itertools.pairwise(tokens):
        counts[before, after] += 1
    expected = counts.sum(1, keepdim=True) * counts.sum(0) / counts.sum()
    assert float(((counts - expected) ** 2 / expected).sum()) < 9 + 4 * math.sqrt(18)


def test_the_key_depends_on_seed_and_position_alone_and_is_fixed_for_ever() -> None:
    assert noise_key(1, 2) == noise_key(1, 2)
    assert len({noise_key(seed, position) for seed in range(50) for position in range(50)}) == 2500
    assert noise_key(0, 0) == 12035550249420947055
    assert all(0 <= noise_key(2**63 - 1, position) < 2**64 for position in range(100))


def test_the_tokens_of_a_seed_are_fixed_for_ever() -> None:
    logits = torch.arange(1000.0).sin().expand(8, -1)
    tokens = [token.token_id for token in sample(logits, [request(5, position) for position in range(8)])]
    assert tokens == [875, 57, 846, 340, 655, 717, 302, 865]


def test_a_draft_drawn_with_the_same_request_agrees_most_of_the_time() -> None:
    generator = torch.Generator().manual_seed(8)
    logits = 3 * torch.randn(400, 101, generator=generator)
    drafts = logits + 0.2 * torch.randn(400, 101, generator=generator)
    requests = [request(11, position, temperature=0.9, top_p=0.95) for position in range(400)]
    pairs = zip(sample(logits, requests), sample(drafts, requests), strict=True)
    assert sum(mine.token_id == draft.token_id for mine, draft in pairs) > 320  # 80 %; apart it would be about 10 %


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_token_is_drawn_that_the_mask_forbids(temperature: float) -> None:
    logits = torch.randn(30, 70, generator=torch.Generator().manual_seed(3))
    allowed = np.array([1 << 5, 0, 1 << 4], dtype=np.uint32)
    requests = [request(1, position, temperature=temperature, logprobs=1) for position in range(30)]
    for row in requests:
        row.allowed = allowed
    sampled = sample(logits, requests)
    assert {token.token_id for token in sampled} == {5, 68}
    for token, row in zip(sampled, logits, strict=True):
        assert token.logprob == pytest.approx(float(row.log_softmax(-1)[token.token_id])), "the model's own"
    wide = logits.repeat(1, 2)[:, ::2]  # rows that are not contiguous
    assert [token.token_id for token in sample(wide[:, :70], requests)] == [
        token.token_id for token in sample(wide[:, :70].contiguous(), requests)
    ]


def test_a_row_does_not_depend_on_the_other_rows() -> None:
    logits = torch.randn(7, 211, generator=torch.Generator().manual_seed(3))
    requests = [request(seed=i, position=3 * i, top_p=0.9, temperature=0.8, logprobs=2) for i in range(7)]
    together = sample(logits, requests)
    alone = [sample(logits[i : i + 1], requests[i : i + 1])[0] for i in range(7)]
    assert together == alone


def test_rows_and_requests_must_match() -> None:
    with pytest.raises(ValueError, match="2 rows of logits for 1 requests"):
        sample(torch.zeros(2, 5), [request()])


def test_a_tiny_temperature_gives_no_nan() -> None:
    row = torch.tensor([[1.0, 3.0, 3.0, -2.0]])
    for mode in ("tempered_logprobs", "processed_logprobs"):
        params = SamplingParams(temperature=1e-40, logprobs=True, logprobs_mode=mode)
        (token,) = sample(row, [SampleRequest(params, seed=1, position=0)])
        assert token.token_id in (1, 2) and token.logprob == pytest.approx(math.log(0.5))
