"""FP8 activations times FP8 and FP4 weights against exact arithmetic on the codes.

A code is a small whole number times a power of two, and a scale is a power of two. A product of two codes therefore
has 8 significant bits at most and is exact in fp32: only the additions round. A sum of products is off by no more than
adds * 2^-24 * (sum of the absolute products), where adds is the number of additions that a product passes through: in
each of the eight sums four per 32 inputs, the first of them to zero and exact, then three that join the sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv4.checkpoint import formats
from dsv4.kernels import backends
from dsv4.kernels.linear import reference
from dsv4.kernels.quant import fake_quant_fp8
from dsv4.kernels.stored import StoredTensor

MODULE = backends.native_module()
BLOCK = 128  # columns of an activation's block; rows and columns of an FP8 weight's
GROUP = 32  # columns of an FP4 weight's group
E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12)
# (inputs, outputs): an FP4 row has an even number of inputs.
SHAPES = [(1, 3), (2, 1), (31, 33), (34, 32), (128, 128), (129, 129), (254, 31), (256, 288), (333, 130), (520, 200)]
# Exponents of a weight's scales. FAR also reaches the kernels' slow paths; NEAR lets every product count.
NEAR, FAR = (-3, 3), (-60, 30)


@dataclass(frozen=True)
class Codes:
    """A matrix as whole numbers times 2^exponents, one exponent per piece of `piece` columns."""

    numbers: Tensor  # int64 [rows, columns]
    exponents: Tensor  # int64 [rows, pieces]
    piece: int


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def whole(low: int, high: int, *shape: int, seed: int = 0) -> Tensor:
    """Whole numbers from low to high, both included."""
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed))


def activation_scales(x: Tensor) -> Tensor:
    """Exponents [rows, blocks] of the smallest powers of two that scale x's blocks to at most 448; amax >= 1e-4."""
    blocks = torch.nn.functional.pad(x, (0, -x.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK)).double()
    amax = blocks.abs().amax(-1).clamp(min=float(torch.tensor(1e-4)))
    exponents = torch.full(amax.shape, -40)
    while (short := amax > 448.0 * torch.exp2(exponents.double())).any():
        exponents += short
    return exponents


def two_to(exponents: Tensor, piece: int, columns: int) -> Tensor:
    """2^exponents for every column, float32."""
    return torch.exp2(exponents.double()).float().repeat_interleave(piece, 1)[:, :columns]


def activations(rows: int, inputs: int) -> tuple[Tensor, Codes]:
    """Rows of different magnitudes, rounded to FP8 by a cast -> their values, and the same as Codes."""
    x = random(rows, inputs, seed=rows) * torch.logspace(-5, 4, rows)[:, None]
    exponents = activation_scales(x)
    scale = two_to(exponents, BLOCK, inputs)
    codes = (x / scale).to(torch.float8_e4m3fn).float()
    return codes * scale, Codes((codes * 512).long(), exponents - 9, BLOCK)


def random_weight(kind: str, outputs: int, inputs: int, spread: tuple[int, int]) -> tuple[StoredTensor, Codes]:
    """Random codes under scales with exponents within `spread` -> the weight as stored, and the same as Codes."""
    if kind == "fp8":
        byte = whole(0, 253, outputs, inputs)
        byte = (byte + (byte >= 127)).to(torch.uint8)  # without the two NaN codes
        codes = byte.view(torch.float8_e4m3fn)
        exponents = whole(*spread, -(-outputs // BLOCK), -(-inputs // BLOCK), seed=1)
        weight = StoredTensor("fp8", codes, e8m0(exponents), formats.dequantize_fp8)
        rows = exponents.repeat_interleave(BLOCK, 0)[:outputs]
        return weight, Codes((codes.float() * 512).long(), rows - 9, BLOCK)
    code = whole(0, 15, outputs, inputs)
    packed = (code[:, 0::2] | code[:, 1::2] << 4).to(torch.uint8).view(torch.int8)
    exponents = whole(*spread, outputs, -(-inputs // GROUP), seed=1)
    weight = StoredTensor("fp4", packed, e8m0(exponents), formats.dequantize_fp4)
    numbers = torch.tensor(E2M1_DOUBLED)[code & 7] * (1 - 2 * (code >> 3))
    return weight, Codes(numbers, exponents - 1, GROUP)


def e8m0(exponents: Tensor) -> Tensor:
    return (exponents + 127).to(torch.uint8).view(torch.float8_e8m0fnu)


def exact_product(x: Codes, weight: Codes) -> tuple[Any, Any, int]:
    """x times the weight, and the sums of the absolute products: Python integers [rows, outputs], times 2^-unit.

    A piece's sum is below 128 * 2^36 and exact in int64; pieces are added under one exponent.
    """
    unit = -int(x.exponents.min() + weight.exponents.min())
    total: Any = 0
    absolute: Any = 0
    for start in range(0, x.numbers.shape[1], weight.piece):
        part = slice(start, start + weight.piece)
        a, b = x.numbers[:, part], weight.numbers[:, part]
        exponents = x.exponents[:, start // x.piece, None] + weight.exponents[None, :, start // weight.piece] + unit
        factor = 2 ** exponents.numpy().astype(object)
        total = total + (a @ b.t()).numpy().astype(object) * factor
        absolute = absolute + (a.abs() @ b.abs().t()).numpy().astype(object) * factor
    return total, absolute, unit


def assert_within(got: Tensor, exact: tuple[Any, Any, int], adds: int) -> None:
    """|got - exact| <= adds * 2^-24 * (sum of the absolute products), all in Python integers."""
    total, absolute, unit = exact
    mantissa, exponent = torch.frexp(got)
    # got = mantissa * 2^24 (whole) * 2^(exponent - 24), in units of 2^-(unit + 256), smaller than its lowest bit.
    shift = (exponent.long() - 24 + unit + 256).numpy().astype(object)
    number = (mantissa.double() * 2.0**24).long().numpy().astype(object) * 2**shift
    off = np.abs(number - total * 2**256)
    assert (off * 2**24 <= adds * absolute * 2**256).all()


def product(module: Any, x: Tensor, weight: Any, outputs: int) -> Tensor:
    y = torch.full((len(x), outputs), float("nan"))
    module.linear(x, weight, y)
    return y


def shapes(kind: str) -> list[tuple[int, int]]:
    return [(inputs, outputs) for inputs, outputs in SHAPES if kind == "fp8" or inputs % 2 == 0]


def additions(isa: str, inputs: int) -> int:
    """Additions that a product passes through: its chain and the join; with AMX its group's chain, then the groups."""
    groups = -(-inputs // 32)
    return 16 + groups + 1 if isa == "amx" else 4 * groups + 2


CASES = [(kind, *shape, spread) for kind in ("fp8", "fp4") for shape in shapes(kind) for spread in (NEAR, FAR)]


@pytest.mark.parametrize(("kind", "inputs", "outputs", "spread"), CASES)
def test_products_match_exact_products_of_the_codes(
    kernels: Any, kind: str, inputs: int, outputs: int, spread: tuple[int, int]
) -> None:
    """The widened weight gives the same bits, as do several threads and portable code that rounds twice, except with
    AMX, whose tiles add in another order."""
    weight, weight_codes = random_weight(kind, outputs, inputs, spread)
    for rows in (1, 2, 13):
        x, x_codes = activations(rows, inputs)
        got = product(kernels, x, weight.parts, outputs)
        assert_within(got, exact_product(x_codes, weight_codes), additions(kernels.selected(), inputs))
        kernels.set_threads(3)
        assert torch.equal(product(kernels, x, weight.parts, outputs), got)
        kernels.set_threads(1)
        isa = kernels.selected()
        if isa == "amx":
            continue
        assert torch.equal(product(kernels, x, weight.widen(), outputs), got)
        kernels.select("portable")
        assert torch.equal(product(kernels, x, weight.parts, outputs), got)
        kernels.select(isa)


@pytest.mark.parametrize(("kind", "inputs", "outputs", "spread"), CASES)
def test_the_reference_computes_the_same_products(
    kind: str, inputs: int, outputs: int, spread: tuple[int, int]
) -> None:
    weight, weight_codes = random_weight(kind, outputs, inputs, spread)
    x, x_codes = activations(5, inputs)
    assert_within(reference.linear(x, weight), exact_product(x_codes, weight_codes), inputs)


@pytest.mark.parametrize("kind", ["fp8", "fp4"])
@pytest.mark.parametrize("rows", [1, 7])
def test_sums_that_fit_24_bits_are_exact(kernels: Any, kind: str, rows: int) -> None:
    """Nothing rounds: one wrong code, index or scale gives a wrong number."""
    inputs, outputs = 334, 133
    x_codes = Codes(whole(-8, 8, rows, inputs), torch.full((rows, 3), -5), BLOCK)
    if kind == "fp8":
        numbers, exponents = whole(-16, 16, outputs, inputs), torch.full((outputs, 3), -7)
        weight = StoredTensor("fp8", numbers.float().to(torch.float8_e4m3fn), e8m0(exponents[::128]), lambda c, s: c)
        weight_codes = Codes(numbers, exponents, BLOCK)
    else:
        weight, weight_codes = random_weight("fp4", outputs, inputs, (4, 4))
    total, absolute, unit = exact_product(x_codes, weight_codes)
    assert absolute.max() < 2**24
    want = torch.from_numpy(total.astype(np.float64) * 2.0**-unit).float()
    assert torch.equal(product(kernels, x_codes.numbers.float() * 2.0**-5, weight.parts, outputs), want)


@pytest.mark.parametrize("inputs", [1, 31, 127, 128, 129, 300, 512])
def test_rounded_activations_are_casts_to_fp8(kernels: Any, inputs: int) -> None:
    """A block's values are codes from a cast to float8_e4m3fn times the scale, signs of zero included."""
    x = random(40, inputs, seed=inputs) * torch.logspace(-9, 7, 40)[:, None]
    x[3] = 0.0
    x[4] = -0.0
    x[5, ::2] *= 1e-4
    exponents = activation_scales(x)
    scale = two_to(exponents, BLOCK, inputs)
    want = (x / scale).to(torch.float8_e4m3fn)
    got = x.clone()
    kernels.fake_quant(got, BLOCK, False)
    codes = got / scale
    assert torch.equal(codes.to(torch.float8_e4m3fn).view(torch.uint8), want.view(torch.uint8))
    assert torch.equal(codes.to(torch.float8_e4m3fn).float(), codes), "a code, exactly"
    assert torch.equal(want.float() * scale, got)
    assert torch.equal(fake_quant_fp8(x, BLOCK), got)


def test_every_bf16_value_rounds_as_a_cast_does(kernels: Any) -> None:
    values = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    values = values[values.abs() <= 448.0]
    x = torch.cat((values, torch.tensor([448.0]))).unsqueeze(0)  # the last value sets the scale to 1
    got = x.clone()
    kernels.fake_quant(got, x.shape[1], False)
    want = x.to(torch.float8_e4m3fn)
    assert torch.equal(got.to(torch.float8_e4m3fn).view(torch.uint8), want.view(torch.uint8))
    assert torch.equal(got, want.float())
