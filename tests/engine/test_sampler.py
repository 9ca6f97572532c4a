import math

import pytest
import torch

from dsv4.engine.sampler import SampleRequest, most_likely, sample, uniform
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


def test_the_samples_follow_the_distribution() -> None:
    logits = torch.tensor([[0.1, 0.2, 0.7]]).log()
    n = 4000
    counts = torch.zeros(3)
    for position in range(n):
        counts[sample(logits, [request(seed=5, position=position)])[0].token_id] += 1
    # Four standard deviations of a binomial share.
    assert torch.allclose(counts / n, torch.tensor([0.1, 0.2, 0.7]), atol=4 * math.sqrt(0.25 / n))


def test_uniform_depends_on_seed_and_position_alone_and_is_fixed_forever() -> None:
    assert uniform(1, 2) == uniform(1, 2)
    assert len({uniform(seed, position) for seed in range(50) for position in range(50)}) == 2500
    assert uniform(0, 0) == 0.6524484863740322
    assert all(0.0 <= uniform(2**63 - 1, position) < 1.0 for position in range(100))


def test_a_row_does_not_depend_on_the_other_rows() -> None:
    logits = torch.randn(7, 211, generator=torch.Generator().manual_seed(3))
    requests = [request(seed=i, position=3 * i, top_p=0.9, temperature=0.8, logprobs=2) for i in range(7)]
    together = sample(logits, requests)
    alone = [sample(logits[i : i + 1], requests[i : i + 1])[0] for i in range(7)]
    assert together == alone


def test_rows_and_requests_must_match() -> None:
    with pytest.raises(ValueError, match="2 rows of logits for 1 requests"):
        sample(torch.zeros(2, 5), [request()])
