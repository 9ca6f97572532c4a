"""Newton-Schulz iterations: every rung against the rule in float64, odd sizes, independence of stacks and threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsv4.kernels import backends
from dsv4.kernels.newton_schulz import Steps, iterate
from dsv4.training.newton_schulz import HYBRID_STEPS, orthogonalize

from .tools import noise, set_threads

SIZES = [
    (1, 1),
    (1, 7),
    (5, 7),
    (8, 8),
    (15, 31),
    (16, 32),
    (17, 33),
    (48, 50),
    (49, 64),
    (70, 130),
    (96, 97),
    (130, 300),
]


def by_rule(x: Tensor, steps: Steps) -> Tensor:
    """The steps with sums in float64, rounded to x's dtype where the contract rounds."""
    for a, b, c in steps:
        wide = x.double()
        gram = (wide @ wide.mT).to(x.dtype).double()
        poly = (b * gram + c * gram @ gram).to(x.dtype).double()
        x = (a * wide + poly @ wide).to(x.dtype)
    return x


def matrices(count: int, n: int, m: int) -> Tensor:
    x = noise(count, n, m, seed=n * 1000 + m)
    return (x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)).bfloat16()


@pytest.mark.parametrize(("n", "m"), SIZES)
def test_one_step_is_the_rule_up_to_rounding(rung: str, n: int, m: int) -> None:
    x = matrices(3, n, m)
    kept = x.clone()
    for step in HYBRID_STEPS[0], HYBRID_STEPS[-1]:
        got, want = iterate(x, (step,)), by_rule(x, (step,))
        assert got.dtype == torch.bfloat16 and got.shape == x.shape
        # A sum close to the middle of two BF16 values may round either way.
        assert (got.double() - want.double()).abs().max() <= 0.01 * want.double().abs().max()
        assert (got == want).double().mean() > 0.97
    assert torch.equal(x, kept), "the input stays"


@pytest.mark.parametrize(("n", "m"), SIZES)
def test_ten_steps_orthogonalize(rung: str, n: int, m: int) -> None:
    x = noise(2, n, m, seed=n + m)
    u, _, v = torch.linalg.svd(x.double(), full_matrices=False)
    if n < m:  # a square random matrix has singular values close to zero
        assert (torch.linalg.svdvals(orthogonalize(x)) - 1).abs().max() < 0.03
        assert (orthogonalize(x).double() - u @ v).abs().max() < 0.1
        torch.testing.assert_close(orthogonalize(x.mT.contiguous()), orthogonalize(x).mT, rtol=0.02, atol=0.01)


def test_a_matrix_depends_on_itself_alone(rung: str) -> None:
    """Many matrices take a thread each, few share the threads; both give the same bits, for any number of threads."""
    x = matrices(9, 70, 130)
    want = iterate(x, HYBRID_STEPS)
    for threads in (1, 2, 3, 5, 8):
        set_threads(rung, threads)
        assert torch.equal(iterate(x, HYBRID_STEPS), want)
        for index in range(0, 9, 4):
            assert torch.equal(iterate(x[index : index + 1], HYBRID_STEPS)[0], want[index])


def test_zero_stays_zero(rung: str) -> None:
    x = matrices(3, 33, 65)
    x[1] = 0.0
    out = iterate(x, HYBRID_STEPS)
    assert torch.count_nonzero(out[1]) == 0 and torch.count_nonzero(out[0]) > 0
    assert iterate(x[:0], HYBRID_STEPS).shape == (0, 33, 65) and torch.equal(iterate(x, ()), x)


def test_wrong_arguments_of_the_kernel_are_named() -> None:
    module = backends.native_module()
    if module is None or not backends.uses_native("newton_schulz", matrices(1, 2, 3)):
        pytest.skip("this machine has no native rung of Newton-Schulz")
    with pytest.raises(ValueError, match="4 rows, more than its 3 columns"):
        module.newton_schulz(torch.zeros(1, 4, 3, dtype=torch.int16), [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="three per step, found 2"):
        module.newton_schulz(torch.zeros(1, 3, 4, dtype=torch.int16), [1.0, 2.0])
