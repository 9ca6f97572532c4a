"""Newton-Schulz iterations, the products of Muon.

Contract: x [N, n, m] of one floating dtype, n <= m; steps, (a, b, c) each -> x after X <- a X + (b G + c G G) X with
G = X X^T, step by step. G, b G + c G G and X are rounded to the dtype, sums are fp32. A matrix's result depends on
itself alone. The native rung takes fp32, and with AVX-512 BF16 also BF16, and computes one triangle of the two
symmetric products; a sum's order differs between rungs. Source: DeepSeek-V4 report, Muon.
"""

from __future__ import annotations

from torch import Tensor

from dsv4.kernels import backends
from dsv4.kernels.newton_schulz import native, reference

Steps = tuple[tuple[float, float, float], ...]


def iterate(x: Tensor, steps: Steps) -> Tensor:
    """The matrices x [N, n, m], n <= m, after the steps."""
    op = native if backends.uses_native("newton_schulz", x) else reference
    return op.iterate(x, steps)


__all__ = ["Steps", "iterate"]
