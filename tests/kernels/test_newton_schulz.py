"""Newton-Schulz iterations: every rung against the rule in float64, odd sizes, independence of stacks and threads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.kernels import backends
from dsv4.kernels.newton_schulz import Steps, iterate
from dsv4.training.newton_schulz import HYBRID_STEPS, orthogonalize

from .tools import noise, set_threads

DTYPES = [torch.bfloat16, torch.float32]
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


def matrices(count: int, n: int, m: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    x = noise(count, n, m, seed=n * 1000 + m)
    return (x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), SIZES)
def test_one_step_is_the_rule_up_to_rounding(rung: str, n: int, m: int, dtype: torch.dtype) -> None:
    x = matrices(3, n, m, dtype)
    kept = x.clone()
    for step in HYBRID_STEPS[0], HYBRID_STEPS[-1]:
        got, want = iterate(x, (step,)), by_rule(x, (step,))
        assert got.dtype == dtype and got.shape == x.shape
        off, largest = (got.double() - want.double()).abs().max(), want.double().abs().max()
        if dtype == torch.float32:
            assert off <= 3e-6 * largest
            continue
        # A sum close to the middle of two BF16 values may round either way.
        assert off <= 0.01 * largest
        assert (got == want).double().mean() > 0.97
    assert torch.equal(x, kept), "the input stays"


@pytest.mark.parametrize(("dtype", "near"), [(torch.bfloat16, 0.03), (torch.float32, 6e-4)])
@pytest.mark.parametrize(("n", "m"), SIZES)
def test_ten_steps_orthogonalize(rung: str, n: int, m: int, dtype: torch.dtype, near: float) -> None:
    x = noise(2, n, m, seed=n + m)
    u, _, v = torch.linalg.svd(x.double(), full_matrices=False)
    if n < m:  # a square random matrix has singular values close to zero
        found = orthogonalize(x, dtype)
        assert (torch.linalg.svdvals(found) - 1).abs().max() < near
        assert (found.double() - u @ v).abs().max() < 3.5 * near
        torch.testing.assert_close(orthogonalize(x.mT.contiguous(), dtype), found.mT, rtol=near, atol=near / 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_matrix_depends_on_itself_alone(rung: str, dtype: torch.dtype) -> None:
    """Many matrices take a thread each, few share the threads; both give the same bits, for any number of threads."""
    x = matrices(9, 70, 130, dtype)
    want = iterate(x, HYBRID_STEPS)
    for threads in (1, 2, 3, 5, 8):
        set_threads(rung, threads)
        assert torch.equal(iterate(x, HYBRID_STEPS), want)
        for index in range(0, 9, 4):
            assert torch.equal(iterate(x[index : index + 1], HYBRID_STEPS)[0], want[index])


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_stays_zero(rung: str, dtype: torch.dtype) -> None:
    x = matrices(3, 33, 65, dtype)
    x[1] = 0.0
    out = iterate(x, HYBRID_STEPS)
    assert torch.count_nonzero(out[1]) == 0 and torch.count_nonzero(out[0]) > 0
    assert iterate(x[:0], HYBRID_STEPS).shape == (0, 33, 65) and torch.equal(iterate(x, ()), x)


def test_wrong_arguments_of_the_kernel_are_named() -> None:
    module = backends.native_module()
    if module is None:
        pytest.skip("the native kernels are not installed")
    for dtype in torch.int16, torch.float32:
        with pytest.raises(ValueError, match="4 rows, more than its 3 columns"):
            module.newton_schulz(torch.zeros(1, 4, 3, dtype=dtype), [1.0, 2.0, 3.0])
        with pytest.raises(ValueError, match="three per step, found 2"):
            module.newton_schulz(torch.zeros(1, 3, 4, dtype=dtype), [1.0, 2.0])


def test_an_instruction_set_without_a_kernel_is_named(kernels: Any) -> None:
    kernels.select("portable")
    for dtype in torch.int16, torch.float32:
        with pytest.raises(ValueError, match="no kernel for these numbers"):
            kernels.newton_schulz(torch.zeros(1, 3, 4, dtype=dtype), [1.0, 2.0, 3.0])


def test_fp32_has_the_same_bits_on_every_instruction_set(kernels: Any) -> None:
    """Sums are chains of multiply-adds in one order, whatever the tiles."""
    if kernels.selected() in ("portable", "avx2"):
        pytest.skip("the portable kernels have no Newton-Schulz, and AVX2 is what others are compared with")
    x = matrices(5, 70, 130, torch.float32)
    got = iterate(x, HYBRID_STEPS)
    kernels.select("avx2")
    assert torch.equal(got, iterate(x, HYBRID_STEPS))
