"""Stored weights: products have the bits of the widened weights', and torch sees the widened weights."""

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.checkpoint import formats
from dsv4.kernels.grouped_linear import grouped_linear
from dsv4.kernels.linear import linear
from dsv4.kernels.stored import StoredStack, StoredTensor, matrices_of, widen_bf16, widened

from .conftest import ISAS, MODULE, use
from .tools import noise

KINDS = ["bf16", "fp8", "fp8-f32-scales", "fp4"]
SHAPES = [(32, 32), (64, 128), (96, 256), (33, 64), (130, 192), (256, 520), (200, 48), (16, 1000), (160, 30), (31, 2)]


def stored(kind: str, rows: int, columns: int) -> StoredTensor:
    """Random values whose rows differ in magnitude, so that blocks and groups differ in scale."""
    values = noise(rows, columns) * torch.logspace(-6, 2, rows)[:, None]
    if kind == "bf16":
        return StoredTensor("bf16", values.bfloat16(), None, widen_bf16)
    if kind == "fp4":
        return StoredTensor("fp4", *formats.quantize_fp4(values), formats.dequantize_fp4)
    scale_dtype = torch.float32 if kind == "fp8-f32-scales" else torch.float8_e8m0fnu
    return StoredTensor("fp8", *formats.quantize_fp8(values, scale_dtype), formats.dequantize_fp8)


# Every shape with two of the four formats, every format with half of the shapes.
PRODUCTS = [(KINDS[(i + j) % 4], shape) for i, shape in enumerate(SHAPES) for j in (0, 1 + i // 4 % 2)]


@pytest.mark.parametrize(("kind", "shape"), PRODUCTS, ids=str)
def test_products_have_the_bits_of_the_widened_weight(kernels: Any, kind: str, shape: tuple[int, int]) -> None:
    """With AMX to rounding, since it multiplies widened weights with other instructions."""
    weight = stored(kind, *shape)
    plain = weight.widen()
    for rows in (1, 2, 7, 16, 17, 40, 200):
        x = noise(rows, shape[1], seed=rows)
        want = torch.full((rows, shape[0]), float("nan"))
        kernels.linear(x, plain, want)
        for threads in (1, 2, 3):
            kernels.set_threads(threads)
            got = torch.full((rows, shape[0]), float("nan"))
            kernels.linear(x, weight.parts, got)
            if kernels.selected() != "amx":
                assert torch.equal(got, want)
            elif threads == 1:
                want = got
            assert torch.equal(got, want)
        exact = x.double() @ plain.double().t()
        assert ((got - exact).abs() <= 2e-6 * (x.abs().double() @ plain.abs().double().t())).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inputs", [512, 46, 808])
def test_a_rows_bits_do_not_depend_on_other_rows(kernels: Any, kind: str, inputs: int) -> None:
    """Of 1,250 rows, also cut by rows; some can be held in BF16, and some weights are not finite."""
    weight = stored(kind, 300, inputs)
    if weight.kind == "bf16":
        weight.codes[7, 5], weight.codes[9, 3] = float("inf"), float("nan")
    x = noise(1250, inputs)
    x[::3] = x[::3].bfloat16().float()
    want = torch.full((len(x), 300), float("nan"))
    kernels.set_threads(2)
    kernels.linear(x, weight.parts, want)
    for count in (1, 2, 5, 6, 16, 17, 48, 49, 200, 600):
        for start in (0, 1, 3, 600):
            got = torch.full((min(count, len(x) - start), 300), float("inf"))
            kernels.linear(x[start : start + count], weight.parts, got)
            pair = (part.nan_to_num(nan=7.0).view(torch.int32) for part in (got, want[start : start + count]))
            assert torch.equal(*pair), (count, start)
    held, want = x[::3], want[::3]  # by BF16
    for count in (1, 17, 32, 33, 48, 49, 300):
        got = torch.full((count, 300), float("inf"))
        kernels.linear(held[:count], weight.parts, got)
        pair = (part.nan_to_num(nan=7.0).view(torch.int32) for part in (got, want[:count]))
        assert torch.equal(*pair), count


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outputs", [1, 16, 45, 100])
def test_one_row_times_a_weight_of_long_rows(kernels: Any, kind: str, outputs: int) -> None:
    weight, x = stored(kind, outputs, 4288), noise(20, 4288)
    together = torch.full((20, outputs), float("nan"))
    kernels.linear(x, weight.parts, together)
    exact = x.double() @ weight.widen().double().t()
    assert ((together - exact).abs() <= 2e-6 * (x.abs().double() @ weight.widen().abs().double().t())).all()
    for threads in (1, 2, 3):
        kernels.set_threads(threads)
        alone = torch.full((1, outputs), float("nan"))
        kernels.linear(x[7:8], weight.parts, alone)
        assert torch.equal(alone[0], together[7])


@pytest.fixture
def amx() -> Iterator[Any]:
    if "amx" not in ISAS:
        pytest.skip("the processor has no AMX")
    yield from use("amx")


@pytest.mark.parametrize("inputs", [2, 30, 64, 334])
@pytest.mark.parametrize("rows", [1, 5, 6, 16, 17, 50])
def test_amx_adds_in_the_documented_order(amx: Any, rows: int, inputs: int) -> None:
    """Products of BF16 numbers are exact in fp32, so only the additions round."""
    x, weight = noise(rows, inputs), stored("bf16", 35, inputs)
    plain, left, sums = weight.widen(), x, []
    for _ in range(3):
        part = (left.view(torch.int32) & -65536).view(torch.float32)
        left = left - part
        products = torch.nn.functional.pad(part[:, None] * plain, (0, -inputs % 32)).view(rows, 35, -1, 16, 2)
        total = torch.zeros(rows, 35)
        for group in range(products.shape[2]):
            chains = torch.zeros(rows, 35, 2)
            for step in range(16):
                chains += products[:, :, group, step]
            total += chains[..., 0] + chains[..., 1]
        sums.append(total)
    assert not left.any(), "three parts hold every bit"
    got = torch.full((rows, 35), float("nan"))
    amx.linear(x, weight.parts, got)
    assert torch.equal(got, sums[0] + (sums[1] + sums[2]))


@pytest.mark.parametrize("scale", [0, 1, 2, 126, 127, 128, 252, 253, 254, 255])
def test_every_fp4_code_under_every_kind_of_scale(kernels: Any, scale: int) -> None:
    """Extreme scales give subnormal or infinite values and NaN."""
    codes = (torch.arange(40)[:, None] * 7 + torch.arange(32)).to(torch.uint8).repeat(1, 2)
    scales = torch.full((40, 4), 127, dtype=torch.uint8)
    scales[3, 1] = scales[39, 2] = scale
    weight = StoredTensor("fp4", codes.view(torch.int8), scales.view(torch.float8_e8m0fnu), formats.dequantize_fp4)
    assert_columns(kernels, weight)


@pytest.mark.parametrize("scale", [0, 1, 127, 134, 135, 200, 254, 255])
def test_every_fp8_code_under_every_kind_of_scale(kernels: Any, scale: int) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 127) != 127].repeat(64 * 160 // 254 + 1)[: 64 * 160].view(64, 160)
    scales = torch.tensor([[127, scale]], dtype=torch.uint8)
    weight = StoredTensor(
        "fp8", codes.view(torch.float8_e4m3fn), scales.view(torch.float8_e8m0fnu), formats.dequantize_fp8
    )
    assert_columns(kernels, weight)


@pytest.mark.parametrize("scale", [100.0, 128.0, 129.0, 1e6, 1e30])
def test_fp8_scales_of_either_sign(kernels: Any, scale: float) -> None:
    """Two block rows and two block columns, with both signs; above 128 the packed panels are made another way."""
    codes = (torch.arange(160)[:, None] * 5 + torch.arange(160)).to(torch.uint8)
    codes[codes & 127 == 127] = 0
    scales = torch.tensor([[scale, -scale], [-scale, scale]])
    weight = StoredTensor("fp8", codes.view(torch.float8_e4m3fn), scales, formats.dequantize_fp8)
    assert_columns(kernels, weight)
    for rows in (1, 5):
        x, got, want = noise(rows, 160), torch.empty(rows, 160), torch.empty(rows, 160)
        kernels.linear(x, weight.parts, got)
        kernels.linear(x, weight.widen(), want)
        assert torch.equal(got, want) if kernels.selected() != "amx" else torch.allclose(got, want, rtol=1e-4)


def assert_columns(kernels: Any, weight: StoredTensor) -> None:
    """One-hot inputs: each product is then an element of the weight, for one row and through packed panels."""
    plain = weight.widen()
    unit = torch.eye(weight.shape[1])
    for rows in (unit, unit[:1].repeat(3, 1), *unit[:: max(1, len(unit) // 9), None]):
        got = torch.full((len(rows), weight.shape[0]), float("nan"))
        kernels.linear(rows, weight.parts, got)
        want = torch.full_like(got, float("nan"))
        kernels.linear(rows, plain, want)
        if kernels.selected() == "amx":
            want[want.abs() < 2.0**-126] = 0.0  # AMX tiles flush smaller numbers to zero
        assert torch.equal(got.nan_to_num(nan=7.0), want.nan_to_num(nan=7.0))
        if plain.isfinite().all():
            exact = rows @ plain.t()
            if kernels.selected() == "amx":
                exact[exact.abs() < 2.0**-126] = 0.0
            assert torch.equal(got, exact)


def test_wrong_parts_are_named() -> None:
    if MODULE is None:
        pytest.skip("the native kernels are not built")
    x, y = noise(1, 64), torch.empty(1, 32)
    kind, codes, scales = stored("fp4", 32, 64).parts
    assert scales is not None
    for parts, what in (
        (("fp5", codes, scales), "kind fp5; allowed: bf16, fp8, fp4"),
        ((kind, codes, scales[:, :1]), "shape [32, 1], expected [32, 2]"),
        ((kind, codes, None), "scales are bytes"),
        ((kind, codes, scales.float()), "scales are bytes"),
        ((kind, codes[:, ::2], scales), "rows must be contiguous"),
    ):
        with pytest.raises(ValueError) as error:
            MODULE.linear(x, parts, y)
        assert what in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_torch_sees_a_float32_matrix(kind: str) -> None:
    weight = stored(kind, 64, 96)
    plain = weight.widen()
    assert weight.shape == plain.shape and weight.dtype == torch.float32 and weight.device == plain.device
    assert torch.equal(weight, plain) and torch.equal(weight[3:5].t(), plain[3:5].t())
    assert torch.equal(weight.to(torch.bfloat16), plain.bfloat16()) and type(weight.double()) is Tensor
    assert widened(weight) is not weight and widened(plain) is plain
    x = noise(3, 96)
    assert torch.allclose(linear(x, weight), x @ plain.t(), rtol=1e-5, atol=1e-5 * float((x @ plain.t()).abs().max()))
    got = grouped_linear(x, [1, 2], StoredStack([weight, weight]))
    assert torch.allclose(got, x @ plain.t(), rtol=1e-5, atol=1e-5 * float(got.abs().max()))
    parameter = torch.nn.Parameter(weight, requires_grad=False)
    for again in (copy.deepcopy(parameter), pickle.loads(pickle.dumps(parameter)), parameter.detach()):
        assert isinstance(again, StoredTensor) and torch.equal(again, plain)
    assert isinstance(copy.deepcopy(parameter), torch.nn.Parameter)
    with torch.inference_mode():
        assert torch.equal(torch.nn.functional.linear(x, widened(weight)), x @ plain.t())


def test_a_stored_weight_is_not_written_to() -> None:
    weight = stored("fp4", 32, 64)
    with pytest.raises(RuntimeError, match="would write to a weight that stays as it is stored"):
        weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="would write"):
        weight.copy_(torch.zeros(32, 64))
    out = torch.zeros(32, 64)
    assert torch.equal(out.copy_(weight), weight.widen())


def test_torch_sees_a_float32_stack_of_mixed_kinds() -> None:
    """FP4, FP8 and BF16 matrices and a plain one, in one tensor without memory of its own."""
    matrices = [*(stored(kind, 64, 96) for kind in ("fp4", "fp8", "bf16")), noise(64, 96)]
    stack = StoredStack(matrices)
    plain = torch.stack([widened(matrix) for matrix in matrices])
    assert stack.shape == plain.shape and stack.dtype == torch.float32
    assert torch.equal(stack, plain) and torch.equal(stack[1], plain[1]) and torch.equal(stack.widen(), plain)
    assert all(a is b for a, b in zip(matrices_of(stack.detach()), matrices, strict=True))
    assert stack.stored_bytes == sum(m.stored_bytes for m in matrices[:3]) + matrices[3].nbytes
    parameter = torch.nn.Parameter(stack, requires_grad=False)
    for again in (copy.deepcopy(parameter), pickle.loads(pickle.dumps(parameter))):
        assert isinstance(again, torch.nn.Parameter) and isinstance(again, StoredStack) and torch.equal(again, plain)
        assert not any(a is b for a, b in zip(matrices_of(again), matrices, strict=True))
    with pytest.raises(RuntimeError, match=r"stored \(StoredStack\(bf16 and fp32 and fp4 and fp8, shape="):
        stack.zero_()
    with pytest.raises(ValueError, match=r"matrix 1 of a stack is torch.float32 \[96, 64\]; allowed: .* \[64, 96\]"):
        StoredStack([matrices[0], noise(96, 64)])
