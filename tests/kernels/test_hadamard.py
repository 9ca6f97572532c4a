"""Hadamard rotation: every rung against the matrix."""

import pytest
import torch

from dsv4.kernels.hadamard import hadamard

from .tools import check_derivatives, near, noise


def matrix(width: int) -> torch.Tensor:
    index = torch.arange(width)
    ones = torch.stack([(index[:, None] & index) >> bit & 1 for bit in range(10)]).sum(0)
    return (1 - 2 * (ones % 2)).double() / width**0.5


@pytest.mark.parametrize("width", [1, 2, 32, 128])
def test_output(rung: str, width: int) -> None:
    x = noise(3, 2, width)
    got = hadamard(x)
    assert near(got, (x.double() @ matrix(width)).float())
    assert torch.equal(hadamard(x[2, 1]), got[2, 1])


def test_gradient() -> None:
    check_derivatives(hadamard, lambda x: x @ matrix(32), (noise(5, 32),))
