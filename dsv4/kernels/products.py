"""Gradients of grouped products on the native kernels, of fp32 factors or rounded ones."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dsv4.kernels import cpu
from dsv4.kernels.precision import Precision, gradient_rows, multiplies_bf16, weight_gradient_factors
from dsv4.kernels.stored import weight_argument


def input_gradient(
    dy: Tensor,
    sizes: Sequence[int],
    weights: Sequence[Tensor],
    factors: Sequence[Tensor] | None,
    d_x: Tensor,
    precision: Precision,
) -> None:
    """d_x [n, in] = each group's rows of dy [n, out] times its weight. factors: the weights as the forward rounded."""
    in_kernel = multiplies_bf16()  # which then rounds, or keeps numbers that are rounded already
    if precision == "fp8" or (precision == "bf16" and not in_kernel):
        assert factors is not None
        dy, weights = gradient_rows(dy, precision), factors
    arguments = [weight_argument(weight) for weight in weights]
    cpu.kernels().input_gradients(dy, list(sizes), arguments, d_x, precision != "fp32" and in_kernel)


def weight_gradient(
    dy: Tensor, x: Tensor, sizes: Sequence[int], d_weights: Sequence[Tensor], precision: Precision
) -> None:
    """d_weights[g] [out, in] = dy^T x over the rows of group g; dy [n, out], x [n, in]."""
    in_kernel = multiplies_bf16()
    if precision == "fp8" or (precision == "bf16" and not in_kernel):
        dy, x = weight_gradient_factors(dy, x, sizes, precision)
    cpu.kernels().weight_gradients(dy, x, list(sizes), list(d_weights), precision != "fp32" and in_kernel)
