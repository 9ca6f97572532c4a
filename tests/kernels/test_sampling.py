"""Sampling: the tokens that the filters keep and the token drawn, in the reference and on every instruction set."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.kernels import backends
from dsv4.kernels.sampling import reference

MODULE = backends.native_module()
Draw = Callable[[Tensor, float, int, float, float, float], int]


@pytest.fixture(params=["reference", *(sorted(MODULE.isas()) if MODULE is not None else [])])
def draw(request: pytest.FixtureRequest) -> Any:
    if request.param == "reference":
        yield reference.draw_token
        return
    assert MODULE is not None
    MODULE.select(request.param)
    yield MODULE.sample
    MODULE.select(MODULE.isas()[-1])


def kept(
    draw: Draw, logits: list[float], temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> list[int]:
    """Tokens drawn over a thousand values of u."""
    row = torch.tensor(logits)
    return sorted({draw(row, temperature, top_k, top_p, min_p, i / 1000) for i in range(1000)})


def test_top_k_keeps_the_k_likeliest_with_ties_to_the_lower_id(draw: Draw) -> None:
    assert kept(draw, [0.0, 2.0, 1.0, 1.0, 1.0], top_k=2) == [1, 2]
    assert kept(draw, [0.0, 2.0, 1.0], top_k=99) == [0, 1, 2]


def test_top_p_keeps_the_fewest_tokens_that_reach_it(draw: Draw) -> None:
    logits = [math.log(p) for p in (0.1, 0.4, 0.2, 0.3)]
    assert kept(draw, logits, top_p=0.39) == [1]
    assert kept(draw, logits, top_p=0.41) == [1, 3]
    assert kept(draw, logits, top_p=0.71) == [1, 2, 3]
    assert kept(draw, logits, top_p=1e-9) == [1]


def test_top_p_counts_shares_of_what_top_k_kept(draw: Draw) -> None:
    logits = [math.log(p) for p in (0.1, 0.4, 0.2, 0.3)]
    assert kept(draw, logits, top_k=2, top_p=0.5) == [1]  # 0.4 is more than half of 0.7


def test_min_p_is_relative_to_the_likeliest(draw: Draw) -> None:
    assert kept(draw, [math.log(p) for p in (0.1, 0.5, 0.24, 0.16)], min_p=0.4) == [1, 2]


def test_temperature_sharpens_before_the_filters(draw: Draw) -> None:
    logits = [math.log(p) for p in (0.6, 0.4)]
    assert kept(draw, logits, top_p=0.65) == [0, 1]
    assert kept(draw, logits, top_p=0.65, temperature=0.5) == [0]  # 0.36 : 0.16
    assert kept(draw, [3.0, 2.0, 3.1], temperature=1e-50) == [2]


def test_impossible_tokens_are_never_drawn(draw: Draw) -> None:
    row = torch.tensor([-math.inf, 0.0, -math.inf, 0.0, -math.inf])
    for filters in ((0, 1.0, 0.0), (5, 1.0, 0.0), (0, 0.999999, 0.0), (0, 1.0, 1e-9)):
        drawn = [draw(row, 1.0, *filters, u) for u in (0.0, 0.25, 0.4999999, 0.5, 0.75, 1 - 2**-53)]
        assert drawn == [1, 1, 1, 3, 3, 3]


FILTERS = [
    (0, 1.0, 0.0),
    (40, 1.0, 0.0),
    (0, 0.9, 0.0),
    (0, 0.99999, 0.0),
    (300, 0.95, 0.01),
    (0, 1.0, 0.2),
    (7, 0.5, 0.5),
]


VOCABS, TEMPERATURES = [1, 15, 16, 1283, 30001], [0.6, 1.0, 3.0]
# Every filter with every vocabulary, and each filter and each vocabulary with every temperature.
CASES = [(v, f, TEMPERATURES[(i + j) % 3]) for i, v in enumerate(VOCABS) for j, f in enumerate(FILTERS)]


@pytest.mark.parametrize(("vocab", "filters", "temperature"), CASES)
def test_draws_match_the_reference(
    kernels: Any, vocab: int, filters: tuple[int, float, float], temperature: float
) -> None:
    """The same token, unless u lies within rounding of the border between two tokens."""
    row = 3 * torch.randn(vocab, generator=torch.Generator().manual_seed(vocab))
    row[vocab // 2 :: 7] = row[0]
    probs = reference.filtered_probs(row, temperature, *filters)
    shares = (probs / probs.sum()).cumsum(0)
    for i in range(40):
        u = (i + 0.37) / 40
        token = kernels.sample(row, temperature, *filters, u)
        assert probs[token] > 0
        assert shares[token] - probs[token] / probs.sum() < u + 1e-5 and shares[token] > u - 1e-5


def test_wrong_input() -> None:
    if MODULE is None:
        pytest.skip("the native kernels are not built")
    with pytest.raises(ValueError, match="temperature"):
        MODULE.sample(torch.zeros(3), 0.0, 0, 1.0, 0.0, 0.5)
    with pytest.raises(ValueError, match="top_k -1"):
        MODULE.sample(torch.zeros(3), 1.0, -1, 1.0, 0.0, 0.5)
    with pytest.raises(ValueError, match="logits"):
        MODULE.sample(torch.zeros(2, 3), 1.0, 0, 1.0, 0.0, 0.5)
