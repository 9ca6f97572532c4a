"""Fake quantization: round to FP8 or FP4 and back, with power-of-two block scales.

Contract (source: official inference kernel). Blocks run along the last dimension; a last,
shorter block is allowed. Computation is fp32, the result has the input's dtype. Gradients pass straight through.
- FP8 e4m3fn: amax floored at 1e-4, scale = 2^ceil(log2(amax / 448)), codes rounded to nearest even and clamped to 448.
  Weights have one scale per 128 x 128 block, cut at the edges, and a floor at the least normal float32.
- FP4 e2m1: amax floored at 6 * 2^-126, scale = 2^ceil(log2(amax / 6)), ties go to the even code.
"""

from dsv4.kernels.quant.reference import FP4_MAX, FP8_MAX, fake_quant_fp4, fake_quant_fp8, fake_quant_fp8_blocks

__all__ = ["FP4_MAX", "FP8_MAX", "fake_quant_fp4", "fake_quant_fp8", "fake_quant_fp8_blocks"]
