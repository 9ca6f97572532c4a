"""Top-k with ties to the lower index: every rung against a sort of (score, index)."""

import pytest
import torch
from torch import Tensor

from dsv4.kernels.topk import top_k_lowest_index

from .tools import noise

INF = float("inf")


def by_sorting(row: list[float], k: int) -> list[int]:
    order = sorted((i for i, x in enumerate(row) if x > -INF), key=lambda i: (-row[i], i))[:k]
    return sorted(order) + [-1] * (k - len(order))


def check(scores: Tensor, k: int) -> None:
    rows = scores.flatten(0, -2).tolist()
    want = torch.tensor([by_sorting(row, k) for row in rows]).view(*scores.shape[:-1], k)
    assert torch.equal(top_k_lowest_index(scores, k), want)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 5), (7, 3), (64, 16), (130, 1), (131, 130), (1023, 16), (5000, 64)])
def test_many_ties(rung: str, n: int, k: int) -> None:
    values = torch.tensor([-INF, -1.5, -0.0, 0.0, 0.0, 1e-40, -1e-40, 2.0, INF])
    pick = torch.randint(0, len(values), (3, 11, n), generator=torch.Generator().manual_seed(n))
    check(values[pick], k)


def test_no_ties(rung: str) -> None:
    check(noise(50, 77), 20)


def test_minus_zero_ties_with_zero(rung: str) -> None:
    assert top_k_lowest_index(torch.tensor([[-0.0, 0.0, -0.0, 0.0]]), 2).tolist() == [[0, 1]]
    assert top_k_lowest_index(torch.tensor([[-1.0, 0.0, -0.0]]), 2).tolist() == [[1, 2]]


def test_neighboring_floats_are_distinguished(rung: str) -> None:
    for x in (-3.0, -1e-30, 1e-30, 1.0, 1e30):
        low = torch.tensor(x)
        high = torch.nextafter(low, torch.tensor(INF))
        assert top_k_lowest_index(torch.stack((low, high))[None], 1).tolist() == [[1]]


def test_nothing_admissible(rung: str) -> None:
    assert top_k_lowest_index(torch.full((2, 4), -INF), 3).tolist() == [[-1, -1, -1]] * 2


def test_sorted_scores(rung: str) -> None:
    """Ascending scores: each exceeds all before it."""
    up = torch.arange(5000.0)
    got = top_k_lowest_index(torch.stack((up, -up, torch.zeros(5000))), 50)
    assert torch.equal(got, torch.stack([torch.arange(4950, 5000), torch.arange(50), torch.arange(50)]))
