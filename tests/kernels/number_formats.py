"""FP8 and FP4 fake quantization restated: float64, search in the table of all codes, no code of dsv4."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def e4m3_magnitudes() -> Array:
    """Values of the codes 0 to 126 (127 is NaN), from the bit fields."""
    code = np.arange(127)
    exponent, mantissa = code >> 3, code & 7
    return np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10))


E4M3 = e4m3_magnitudes()
E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def nearest(x: Array, magnitudes: Array) -> Array:
    """Nearest value of a format, ties to the even code, larger values clamped; the sign is kept."""
    size = np.abs(x)
    upper = np.searchsorted(magnitudes, size).clip(1, len(magnitudes) - 1)
    below, above = size - magnitudes[upper - 1], magnitudes[upper] - size
    down = (below < above) | ((below == above) & (upper % 2 == 1))
    return np.copysign(magnitudes[np.where(down, upper - 1, upper)], x)


def fake_quant(x: Array, block: int, magnitudes: Array, floor: float) -> Array:
    """Blocks along the last dimension, scaled by the smallest power of two that brings the largest value into range."""
    out = np.empty_like(x, dtype=np.float64)
    for start in range(0, x.shape[-1], block):
        part = x[..., start : start + block].astype(np.float64)
        amax = np.maximum(np.abs(part).max(-1, keepdims=True), floor)
        exponent = np.floor(np.log2(amax / magnitudes[-1])) - 1
        while (short := amax > magnitudes[-1] * 2.0**exponent).any():
            exponent += short
        out[..., start : start + block] = nearest(part / 2.0**exponent, magnitudes) * 2.0**exponent
    return out


def fake_fp8(x: Array, block: int) -> Array:
    return fake_quant(x, block, E4M3, 1e-4)


def fake_fp4(x: Array) -> Array:
    return fake_quant(x, 32, E2M1, 6 * 2.0**-126)


def to_bf16(x: Array) -> Array:
    """x rounded to 8 significant bits, ties to even."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.round(mantissa * 256) / 256, exponent)
