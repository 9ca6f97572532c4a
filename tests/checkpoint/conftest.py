"""An independent writer of number formats: numpy, float64, search in the table of all codes; nothing from dsv4."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

Array = np.ndarray[Any, Any]


def e4m3_table() -> Array:
    """Value of each of the 256 FP8 codes, from the bit fields; codes 127 and 255 are NaN."""
    values: list[float] = []
    for code in range(256):
        sign, exponent, mantissa = -1.0 if code & 128 else 1.0, code >> 3 & 15, code & 7
        value = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
        values.append(np.nan if code & 127 == 127 else sign * value)
    return np.array(values)


def e2m1_table() -> Array:
    values: list[float] = []
    for code in range(16):
        sign, exponent, mantissa = -1.0 if code & 8 else 1.0, code >> 1 & 3, code & 1
        value = mantissa * 0.5 if exponent == 0 else (2 + mantissa) * 2.0 ** (exponent - 2)
        values.append(sign * value)
    return np.array(values)


def nearest_code(scaled: Array, table: Array) -> Array:
    """Nearest non-negative code of |scaled|, ties to the even code, clamped; then the sign bit (half the table)."""
    magnitudes = table[: len(table) // 2]
    magnitudes = magnitudes[np.isfinite(magnitudes)]
    distance = np.abs(np.abs(scaled)[..., None] - magnitudes)
    best = distance == distance.min(-1, keepdims=True)
    first = best.argmax(-1)
    tie = best.sum(-1) > 1
    code = np.where(tie & (first % 2 == 1), first + 1, first)
    return (code + np.signbit(scaled) * (len(table) // 2)).astype(np.uint8)


def blocked_scales(weight: Array, rows: int, columns: int, largest: float, zero: int) -> Array:
    """Exponent of the training rule for each block: the smallest e with amax <= largest * 2^e; `zero` if amax is 0."""
    grid = np.empty((-(-weight.shape[0] // rows), -(-weight.shape[1] // columns)), dtype=np.int64)
    for i, j in np.ndindex(grid.shape):
        amax = np.abs(weight[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]).max()
        exponents = [e for e in range(-127, 128) if amax <= largest * 2.0**e]
        grid[i, j] = zero if amax == 0 else exponents[0]
    return grid


class Oracle:
    """The training rule (architecture notes 2.8) as plain numpy; `weight` is float64 [out, in]."""

    e4m3 = e4m3_table()
    e2m1 = e2m1_table()

    @classmethod
    def fp8(cls, weight: Array) -> tuple[Array, Array]:
        """-> (uint8 codes [out, in], uint8 E8M0 scales [ceil(out/128), ceil(in/128)])."""
        exponents = blocked_scales(weight, 128, 128, 448.0, -22)
        scale = cls.expand(2.0**exponents, 128, 128, weight.shape)
        return nearest_code(weight / scale, cls.e4m3), (exponents + 127).astype(np.uint8)

    @classmethod
    def fp8_f32(cls, weight: Array) -> tuple[Array, Array]:
        """Base layout -> (uint8 codes, float32 scales amax / 448)."""
        exponents = blocked_scales(weight, 128, 128, 448.0, -22)
        scales = np.empty(exponents.shape, dtype=np.float32)
        for i, j in np.ndindex(scales.shape):
            amax = np.abs(weight[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]).max()
            scales[i, j] = amax / 448.0 if amax else 1.0
        return nearest_code(weight / cls.expand(scales, 128, 128, weight.shape), cls.e4m3), scales

    @classmethod
    def fp4(cls, weight: Array) -> tuple[Array, Array]:
        """-> (uint8 [out, in/2], low nibble first, uint8 E8M0 scales [out, ceil(in/32)])."""
        exponents = blocked_scales(weight, 1, 32, 6.0, -126)
        codes = nearest_code(weight / cls.expand(2.0**exponents, 1, 32, weight.shape), cls.e2m1)
        return codes[:, 0::2] | codes[:, 1::2] << 4, (exponents + 127).astype(np.uint8)

    @classmethod
    def read_fp8(cls, codes: Array, scales: Array) -> Array:
        """`scales`: float multipliers, one a block."""
        return cls.e4m3[codes] * cls.expand(scales, 128, 128, codes.shape)

    @classmethod
    def read_fp4(cls, packed: Array, scales: Array) -> Array:
        codes = np.stack([packed & 15, packed >> 4], -1).reshape(packed.shape[0], -1)
        return cls.e2m1[codes] * cls.expand(scales, 1, 32, codes.shape)

    @staticmethod
    def expand(grid: Array, rows: int, columns: int, shape: tuple[int, ...]) -> Array:
        return grid.repeat(rows, 0).repeat(columns, 1)[: shape[0], : shape[1]]


@pytest.fixture(scope="session")
def oracle() -> type[Oracle]:
    return Oracle
