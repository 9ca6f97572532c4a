"""AVX-512's products of BF16 pairs have the bits of fp32 products wherever they are used, tiny sums included."""

import pytest
import torch
from torch import Tensor

from dsv4.checkpoint import formats
from dsv4.kernels import backends
from dsv4.kernels.linear import linear
from dsv4.kernels.stored import StoredTensor

from .test_shipped_arithmetic import FAR, NEAR, SHAPES, activations, e8m0, random_weight

MODULE = backends.native_module()
pytestmark = pytest.mark.skipif(
    MODULE is None or "avx512_bf16" not in MODULE.isas(), reason="the processor has no BF16 products in AVX-512"
)


def both(x: Tensor, weight: StoredTensor | Tensor) -> tuple[Tensor, Tensor]:
    """x @ weight^T by BF16 pairs, and in fp32."""
    assert MODULE is not None
    out, before = [], MODULE.selected()
    try:
        for isa in ("avx512_bf16", "avx512"):
            MODULE.select(isa)
            out.append(linear(x, weight))
    finally:
        MODULE.select(before)
    return out[0], out[1]


@pytest.mark.parametrize("spread", [NEAR, FAR, (-100, 100)])
@pytest.mark.parametrize(
    ("kind", "inputs", "outputs"),
    [("fp8", *shape) for shape in SHAPES] + [("fp4", *shape) for shape in SHAPES if shape[0] % 2 == 0],
)
def test_the_bits_of_fp32(kind: str, inputs: int, outputs: int, spread: tuple[int, int]) -> None:
    weight, _ = random_weight(kind, outputs, inputs, spread)
    x, _ = activations(27, inputs)
    for rows in (x, x[:2], x[5:6], torch.cat((x[:3], torch.randn(1, inputs)))):
        got, want = both(rows.contiguous(), weight)
        assert torch.equal(got, want)


@pytest.mark.parametrize("kind", ["fp8", "fp4"])
def test_sums_too_small_for_the_instruction(kind: str) -> None:
    """Inputs that cancel except in their last bit: the sum is the lowest bit that the two factors allow."""
    inputs, outputs = 64, 40
    least = 2.0**-9 if kind == "fp8" else 0.5  # smallest positive code
    codes = torch.zeros(outputs, inputs)
    codes[:, 0], codes[:, 2] = least, -least
    exponents = torch.arange(-110, -50)
    x = torch.zeros(2, inputs)
    for exponent in range(-60, -30):
        x[:, 0], x[:, 2] = (1 + 2**-7) * 2.0**exponent, 2.0**exponent
        for at in range(len(exponents)):
            scale = exponents[at : at + 1, None]
            if kind == "fp8":
                weight = StoredTensor("fp8", codes.to(torch.float8_e4m3fn), e8m0(scale), formats.dequantize_fp8)
            else:
                code = ((codes != 0) * 1 + (codes < 0) * 8).to(torch.uint8)
                packed = (code[:, 0::2] | code[:, 1::2] << 4).view(torch.int8)
                weight = StoredTensor(
                    "fp4", packed, e8m0(scale.expand(outputs, inputs // 32).contiguous()), formats.dequantize_fp4
                )
            got, want = both(x, weight)
            assert torch.equal(got, want), (exponent, int(scale))
            assert (want == least * 2.0 ** (exponent - 7 + int(scale))).all()


def test_infinite_nan_and_tiny_inputs() -> None:
    weight, _ = random_weight("fp4", 48, 64, NEAR)
    for value in (torch.inf, -torch.inf, torch.nan, 1e-42, 2.0**-41):
        x = torch.ones(3, 64)
        x[1, 17] = value
        got, want = both(x, weight)
        assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))
