"""RMS norm: every rung against the formula, gradients, other dtypes."""

import pytest
import torch
from torch import Tensor

from dsv4.kernels.norm import rms_norm

from .tools import check_derivatives, near, noise, set_threads


def formula(x: Tensor, weight: Tensor | float, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize("width", [1, 7, 16, 63, 65, 512])
def test_output_and_independence_of_rows(rung: str, width: int) -> None:
    x, weight = noise(3, 5, width), noise(width, seed=1)
    for w in (weight, None):
        got = rms_norm(x, 1e-6, w)
        assert near(got, formula(x.double(), w.double() if w is not None else 1.0, 1e-6).float())
        for threads in (1, 3):
            set_threads(rung, threads)
            assert torch.equal(rms_norm(x[1:2, 3:], 1e-6, w), got[1:2, 3:])
    assert rms_norm(x[:0], 1e-6, weight).shape == (0, 5, width)


def test_a_strided_weight(rung: str) -> None:
    x, weight = noise(3, 33), noise(33, 2, seed=1)[:, 0]
    assert torch.equal(rms_norm(x, 1e-6, weight), rms_norm(x, 1e-6, weight.clone()))


def test_gradients() -> None:
    x, weight = noise(3, 5, 33), noise(33, seed=1)
    check_derivatives(lambda x, w: rms_norm(x, 1e-6, w), lambda x, w: formula(x, w, 1e-6), (x, weight))
    check_derivatives(lambda x: rms_norm(x, 0.1), lambda x: formula(x, 1.0, 0.1), (x,))


def test_bfloat16_is_normed_in_fp32(rung: str) -> None:
    x, weight = noise(3, 33).bfloat16(), noise(33, seed=1)
    low, want = rms_norm(x, 1e-6, weight), formula(x.float(), weight, 1e-6).bfloat16()
    assert low.dtype == torch.bfloat16 and (low.float() - want.float()).abs().max() < 0.02
