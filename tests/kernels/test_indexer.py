"""The native indexer's choice: exact whatever the instruction set filters before, for few tokens and for many."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.kernels import backends

MODULE = backends.native_module()
FILTERS = ("avx512_vnni", "avx512_bf16", "amx")
pytestmark = pytest.mark.skipif(MODULE is None, reason="the native kernels are not built")
CASES = ["random", "equal", "near", "far", "negative", "infinite", "no number", "tiny"]
CASES += ["small", "smaller", "huge", "subnormal", "huge queries", "huge weights", "tiny weights"]


def inputs(case: str, tokens: int, heads: int, width: int, entries: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens * heads + width)
    q = torch.randn(tokens, heads, width, generator=generator)
    weights = torch.randn(tokens, heads, generator=generator)
    keys = torch.randn(entries, width, generator=generator)
    if case == "equal":
        keys[:] = keys[0]
    elif case == "near":  # closer than BF16 tells
        keys = keys[:1] * (1 + 1e-5 * torch.randn(entries, 1, generator=generator))
    elif case == "far":
        keys *= torch.logspace(-12, 12, entries)[torch.randperm(entries, generator=generator), None]
    elif case == "negative":
        weights = -weights.abs()
    elif case == "infinite":
        keys[entries // 2, 0] = torch.inf
        q[0, 0, 0] = torch.inf
    elif case == "no number":
        keys[entries // 3] = torch.nan
    elif case == "small":  # squares of such numbers are zero in fp32
        keys *= 1e-24
    elif case == "smaller":
        keys *= 1e-22
        q *= 1e-20
    elif case == "huge":  # their products are infinite, in BF16 some that are not in fp32
        keys *= 1e19
        q *= 1e18
    elif case == "subnormal":
        weights = torch.full_like(weights, 1e-45)
        keys *= 0.03
    elif case == "huge queries":  # rows' norms are near fp32's end, scores are not
        q, keys, weights = q * 2.0**60, keys * 2.0**-20, weights.abs().clamp(max=1.9) * 2.0**29
    elif case == "huge weights":  # a weight times a query is beyond fp32's end, the score is not
        q, keys, weights = q * 2.0**60, keys * 2.0**-20, weights.abs() * 2.0**60
    elif case == "tiny weights":  # a weight times a query's last bit is subnormal
        q, keys, weights = q * 2.0**-38, keys * 2.0**27, weights * 2.0**-98
    elif case == "tiny":
        keys *= 1e-39
        q *= 1e-3
    return q, weights, keys


def choice(kernels: Any, q: Tensor, weights: Tensor, keys: Tensor, start: int, k: int) -> Tensor:
    index = torch.full((len(q), k), -7, dtype=torch.int64)
    kernels.index_top_k(q, weights, keys, start, k, index)
    return index


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("tokens", "heads", "width", "start", "k"),
    [(40, 8, 64, 1000, 16), (67, 3, 24, 259, 7), (9, 20, 128, 5000, 64), (3, 5, 40, 34001, 16)],
)
def test_choice(kernels: Any, case: str, tokens: int, heads: int, width: int, start: int, k: int) -> None:
    q, weights, keys = inputs(case, tokens, heads, width, (start + tokens) // 4)
    together = choice(kernels, q, weights, keys, start, k)
    kernels.set_threads(2)
    assert torch.equal(choice(kernels, q, weights, keys, start, k), together)
    for token in range(tokens):
        alone = choice(kernels, q[token : token + 1], weights[token : token + 1], keys, start + token, k)
        assert torch.equal(alone[0], together[token]), token
    if kernels.selected() in FILTERS:
        kernels.select("avx512")  # every score is computed, with the same bits
    assert torch.equal(choice(kernels, q, weights, keys, start, k), together)


def test_tiles_overflow_where_chains_do_not(kernels: Any) -> None:
    q, weights, keys = torch.zeros(8, 1, 32), torch.ones(8, 1), torch.zeros(10, 32)
    q[:, 0, 0], keys[0, 0], keys[1, 0] = 1.843e19, 1.8415e19, 1.843e19
    assert (choice(kernels, q, weights, keys, 31, 1) == 1).all()
    # So may a head of weight zero: infinite times zero is no number.
    q, weights = torch.cat((q, torch.eye(32)[1].expand(8, 1, 32)), dim=1), torch.tensor([[0.0, 1.0]]).repeat(8, 1)
    keys[:, 1] = torch.tensor([1.0, 2.0]).repeat(5)
    assert (choice(kernels, q, weights, keys, 31, 1) == 1).all()


@pytest.mark.parametrize("numbers", ["whole", "bf16"])
def test_rounding_errors_that_add_up(kernels: Any, numbers: str) -> None:
    """The best keys are rounded down in all channels, the others up in the mean; then the queries are."""
    width, entries, k = 64, 300, 4
    # Equal largest numbers give whole numbers a known step; from 1 to 2 BF16 has steps of 2^-7.
    low, step = (0.0, 1 / int((2**31 / width) ** 0.5)) if numbers == "whole" else (1.0, 2.0**-7)
    q, weights, keys = torch.ones(8, 1, width), torch.ones(8, 1), torch.zeros(entries, width)
    q[:, :, 0], keys[:, 0] = 0, 1
    keys[:, 1::2], keys[:, 2::2] = low + 0.52 * step, low + 0.40 * step
    keys[100:104, 1:] = low + 0.48 * step
    assert (choice(kernels, q, weights, keys, 4 * entries - 8, k) == torch.arange(100, 104)).all()
    q[:], keys[:] = 0, 0
    q[:, :, 0] = 1
    q[:, :, 1::2], q[:, :, 2::2] = low + 0.52 * step, low + 0.48 * step
    keys[:, 1::2], keys[100:104, 2::2] = 1, 1
    # So much less that the best lead by 31 hundredths of a step.
    keys[100:104, 1::2] = 1 - 31 * (low + 0.47 * step) / (32 * (low + 0.52 * step))
    assert (choice(kernels, q, weights, keys, 4 * entries - 8, k) == torch.arange(100, 104)).all()


def test_against_the_reference(kernels: Any) -> None:
    start, tokens, k = 1999, 21, 32
    q, weights, keys = inputs("random", tokens, 4, 32, (start + tokens) // 4)
    index = choice(kernels, q, weights, keys, start, k)
    for token in range(tokens):
        seen = keys[: (start + token + 1) // 4].double()
        scores = (weights[token].double()[:, None] * (q[token].double() @ seen.t()).relu()).sum(0)
        want = scores.topk(k).indices.sort().values
        assert torch.equal(index[token], want), token


def test_few_entries_and_wrong_input(kernels: Any) -> None:
    q, weights, keys = inputs("random", 12, 2, 16, 5)
    assert (choice(kernels, q, weights, keys, 4, 3)[:11] == -1).all(), "tokens that see three entries read them all"
    chosen = choice(kernels, q, weights, keys, 4, 3)[11].tolist()
    assert chosen == sorted(set(chosen)) and set(chosen) <= set(range(4))
    for start in (12, 2**63 - 1):
        with pytest.raises(ValueError, match="the keys end"):
            choice(kernels, q, weights, keys, start, 3)
    for shape in ((12, 0, 16), (12, 2, 0)):
        with pytest.raises(ValueError, match="allowed are 1 or more"):
            choice(kernels, torch.zeros(shape), torch.zeros(shape[:2]), torch.zeros(5, shape[2]), 4, 3)


def test_top_k_of_sorted_scores(kernels: Any) -> None:
    """Ascending scores: each is above all before it."""
    up = torch.arange(5000.0)
    scores = torch.stack((up, -up, torch.zeros(5000), torch.full((5000,), -torch.inf)))
    scores[3, 100::7] = torch.nan
    index = torch.full((4, 50), -1, dtype=torch.int64)
    kernels.top_k(scores, 50, index)
    want = torch.stack([torch.arange(4950, 5000), torch.arange(50), torch.arange(50), torch.arange(50)])
    assert torch.equal(index, want)
