"""Fake quantization: round to FP8 or FP4 and back, with power-of-two block scales; or to BF16.

Contract (source: official inference kernel). Blocks run along the last dimension; the last one may be shorter.
Computation is fp32, the result has the input's dtype. Gradients pass straight through. NaN stays NaN, in the reference
with its block; a block with an infinite number is NaN.
- FP8 e4m3fn: amax floored (activations: at 1e-4), scale = 2^ceil(log2(amax / 448)), codes rounded to nearest even and
  clamped to 448. Weights have one scale per 128 x 128 block, cut at the edges, with amax floored at the smallest normal
  float32.
- FP4 e2m1: amax floored at 6 * 2^-126, scale = 2^ceil(log2(amax / 6)), ties go to the even code.
"""

from torch import Tensor

from dsv4.analysis.inventory import FP4_GROUP
from dsv4.kernels import backends
from dsv4.kernels.quant import native, reference
from dsv4.kernels.quant.reference import FP4_MAX, FP8_FLOOR, FP8_MAX, fake_quant_bf16, fake_quant_fp8_blocks


def fake_quant_fp8(x: Tensor, block: int, floor: float = FP8_FLOOR) -> Tensor:
    """Round x [..., n] to e4m3fn, one power-of-two scale per `block` of the last dimension -> like x.

    floor: least amax of a block.
    """
    op = native if backends.uses_native("quant", x) else reference
    return op.fake_quant_fp8(x, block, floor)


def fake_quant_fp4(x: Tensor, block: int = FP4_GROUP) -> Tensor:
    """Round x [..., n] to e2m1, one power-of-two scale per `block` of the last dimension -> like x."""
    op = native if backends.uses_native("quant", x) else reference
    return op.fake_quant_fp4(x, block)


__all__ = ["FP4_MAX", "FP8_MAX", "fake_quant_bf16", "fake_quant_fp4", "fake_quant_fp8", "fake_quant_fp8_blocks"]
