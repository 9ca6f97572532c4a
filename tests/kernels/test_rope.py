"""Rotation: every rung against complex numbers in float64, its inverse and its gradient."""

import pytest
import torch
from torch import Tensor

from dsv4.kernels.rope import rotate, rotation

from .tools import near, noise


def speeds(pairs: int) -> Tensor:
    return 10.0 ** -torch.arange(pairs).float().div(4)


def turned(x: Tensor, inv_freq: Tensor, positions: Tensor) -> Tensor:
    """The last channels as complex numbers, rotated by fp32 angles."""
    x, pairs = x.double(), len(inv_freq)
    angle = (positions.float().unsqueeze(-1) * inv_freq).double()
    still, turning = x.split((x.shape[-1] - 2 * pairs, 2 * pairs), dim=-1)
    turns = torch.polar(torch.ones_like(angle), angle)
    out = torch.view_as_complex(turning.unflatten(-1, (-1, 2)).clone()) * turns
    return torch.cat((still, torch.view_as_real(out).flatten(-2)), dim=-1).float()


@pytest.mark.parametrize(("rows", "width", "pairs"), [(1, 2, 1), (3, 9, 4), (70, 130, 17), (2, 5, 0)])
def test_rotation_and_its_inverse(rung: str, rows: int, width: int, pairs: int) -> None:
    x, positions = noise(rows, width), torch.tensor([0, 5, 1_000_000]).repeat(rows)[:rows] + torch.arange(rows)
    cos, sin = rotation(speeds(pairs), positions)
    assert cos.shape == sin.shape == (rows, 2 * pairs)
    got = rotate(x, cos, sin)
    assert near(got, turned(x, speeds(pairs), positions), 1e-6)
    assert near(rotate(got, cos, -sin), x, 1e-6)
    assert torch.equal(rotate(x[-1:], cos[-1:], sin[-1:]), got[-1:])


def test_factors_broadcast_over_heads(rung: str) -> None:
    x, (cos, sin) = noise(4, 3, 10), rotation(speeds(2), torch.tensor([3, 0, 70000, 9]))
    together = rotate(x, cos.unsqueeze(1), sin.unsqueeze(1))
    for head in range(3):
        assert torch.equal(rotate(x[:, head], cos, sin), together[:, head])


def test_gradient_is_the_inverse_rotation() -> None:
    factors = rotation(speeds(8), torch.tensor([0, 3, 70000]))
    x, pull = noise(3, 24).requires_grad_(), noise(3, 24, seed=1)
    (grad,) = torch.autograd.grad(rotate(x, *factors), x, pull)
    assert torch.allclose(grad, rotate(pull, factors[0], -factors[1]), atol=1e-6)
