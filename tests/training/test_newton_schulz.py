"""HybridNS against the singular-value ranges that the report's coefficients give (computed with scalars)."""

from __future__ import annotations

import pytest
import torch

from dsv4.training.newton_schulz import FAST, HYBRID_STEPS, orthogonalize

CLASSIC = (FAST,) * 5
EIGHT = (FAST,) * 8
RANGES = [
    (CLASSIC, -4, 0.048, 1.202),
    (CLASSIC, -3, 0.471, 1.202),
    (EIGHT, -4, 0.682, 1.202),
    (EIGHT, -3, 0.682, 1.134),
    (HYBRID_STEPS, -4, 1.0000, 1.0020),
    (HYBRID_STEPS, -3, 1.0000, 1.0005),
]


def scalar_map(sigma: torch.Tensor, steps: tuple[tuple[float, float, float], ...]) -> torch.Tensor:
    for a, b, c in steps:
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    return sigma


@pytest.mark.parametrize(("steps", "low_exponent", "low", "high"), RANGES)
def test_coefficients_reach_the_published_ranges(
    steps: tuple[tuple[float, float, float], ...], low_exponent: int, low: float, high: float
) -> None:
    sigma = torch.logspace(low_exponent, 0, 200_001, dtype=torch.float64)
    out = scalar_map(sigma, steps)
    decimals = 4 if steps is HYBRID_STEPS else 3
    assert round(float(out.min()), decimals) == pytest.approx(low, abs=1e-9)
    assert round(float(out.max()), decimals) == pytest.approx(high, abs=1e-9)


def with_singular_values(n: int, m: int, sigma: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """A matrix [1, n, m] of unit Frobenius norm with singular values proportional to `sigma`, and its polar factor."""
    full = torch.randn(n, m, dtype=torch.float64, generator=generator)
    u, _, v = torch.linalg.svd(full, full_matrices=False)
    return (u * (sigma / sigma.norm()) @ v)[None], u @ v


@pytest.mark.parametrize(("n", "m"), [(24, 40), (40, 24), (33, 33), (1, 7)])
def test_matrices_follow_the_scalar_map(n: int, m: int) -> None:
    generator = torch.Generator().manual_seed(n * 100 + m)
    # Relative to the Frobenius norm the smallest is about 1e-3, the end of the range that the schedule covers.
    sigma = torch.logspace(-2.3, 0, min(n, m), dtype=torch.float64)
    matrix, polar = with_singular_values(n, m, sigma, generator)
    out = orthogonalize(matrix, torch.float64)[0]
    values = torch.linalg.svdvals(out)
    assert values.min() > 1.0 - 1e-4
    assert values.max() < 1.00055
    assert (out - polar).abs().max() < 1e-3
    single = orthogonalize(matrix.float(), torch.float32)[0]
    assert (single - polar.float()).abs().max() < 2e-3


def test_bf16_products_are_close_enough() -> None:
    matrices = torch.randn(3, 48, 96, generator=torch.Generator().manual_seed(3))
    values = torch.linalg.svdvals(orthogonalize(matrices, torch.bfloat16))
    assert values.min() > 0.985
    assert values.max() < 1.015


def test_scale_of_the_input_does_not_matter() -> None:
    matrix = torch.randn(1, 12, 20, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(
        orthogonalize(matrix, torch.float32), orthogonalize(matrix * 1e-5, torch.float32), rtol=0, atol=1e-5
    )


def test_zero_stays_zero_and_stacks_do_not_mix() -> None:
    generator = torch.Generator().manual_seed(5)
    stack = torch.randn(5, 6, 9, generator=generator)
    stack[2] = 0.0
    out = orthogonalize(stack, torch.float32)
    assert torch.count_nonzero(out[2]) == 0
    torch.testing.assert_close(out[4:], orthogonalize(stack[4:], torch.float32))
