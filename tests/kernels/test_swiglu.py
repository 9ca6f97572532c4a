"""Clamped SwiGLU: every rung against the formula, gradients, extremes."""

import pytest
import torch
from torch import Tensor

from dsv4.kernels.swiglu import clamped_swiglu

from .tools import check_derivatives, near, noise, set_threads


def formula(gate: Tensor, up: Tensor, weight: Tensor | float, limit: float) -> Tensor:
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(gate) * up * weight


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 15), (2, 16), (5, 33), (70, 100)])
def test_output_and_independence_of_rows(rung: str, rows: int, width: int) -> None:
    gate, up, weight = noise(rows, width, scale=5), noise(rows, width, seed=1, scale=5), noise(rows, 1, seed=2)
    gate[0, -1], up[-1, 0] = 100.0, -100.0
    for limit in (7.0, 0.5):
        for w in (weight, None):
            got = clamped_swiglu(gate, up, limit, w)
            assert near(got, formula(gate.double(), up.double(), w.double() if w is not None else 1.0, limit).float())
            set_threads(rung, 2)
            assert torch.equal(clamped_swiglu(gate[-1:], up[-1:], limit, w[-1:] if w is not None else None), got[-1:])


def test_strided_weights_of_rows(rung: str) -> None:
    gate, up, weight = noise(5, 33), noise(5, 33, seed=1), noise(5, 3, seed=2)[:, 1:2]
    assert torch.equal(clamped_swiglu(gate, up, 7.0, weight), clamped_swiglu(gate, up, 7.0, weight.clone()))


@pytest.mark.parametrize("limit", [0.7, 10.0])
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (3, 40)])
def test_gradients(shape: tuple[int, int], limit: float) -> None:
    gate, up, weight = noise(*shape), noise(*shape, seed=1, scale=2.0), noise(shape[0], 1, seed=2)
    check_derivatives(lambda g, u: clamped_swiglu(g, u, limit), lambda g, u: formula(g, u, 1.0, limit), (gate, up))
    check_derivatives(
        lambda g, u, w: clamped_swiglu(g, u, limit, w), lambda g, u, w: formula(g, u, w, limit), (gate, up, weight)
    )


def test_the_extremes(rung: str) -> None:
    gate = torch.tensor([[-200.0, -20.0, 20.0, 200.0]])
    out = clamped_swiglu(gate, torch.tensor([[300.0, -300.0, 300.0, -300.0]]), 10.0)
    want = torch.tensor([[0.0, 20 / (1 + torch.e**20) * 10, 100 / (1 + torch.e**-10), -100 / (1 + torch.e**-10)]])
    assert torch.allclose(out, want, rtol=1e-5, atol=1e-35)


def test_nan_stays_in_its_place(rung: str) -> None:
    gate, up = noise(2, 40), noise(2, 40, seed=1)
    gate[0, 0] = float("nan")
    out = clamped_swiglu(gate, up, 7.0)
    assert out[0, 0].isnan() and out.isnan().sum() == 1
