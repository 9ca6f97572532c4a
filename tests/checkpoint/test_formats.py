"""Number formats: every code, every tie, the training rule, and the fixed point of quantize(dequantize(x))."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4.checkpoint import formats

E8M0 = torch.float8_e8m0fnu
FP8 = torch.float8_e4m3fn
SHAPES = [(1, 2), (3, 34), (128, 128), (130, 260), (257, 126), (64, 512)]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def random_weight(rows: int, columns: int, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    """Normal values whose 32-column groups differ in size by e^(spread * normal)."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.randn(rows, -(-columns // 32), generator=generator).mul(spread).exp()
    weight = torch.randn(rows, columns, generator=generator)
    return weight * size.repeat_interleave(32, 1)[:, :columns]


def test_all_256_e8m0_codes_are_powers_of_two() -> None:
    byte = torch.arange(256, dtype=torch.uint8)
    value = formats.decode_e8m0(byte.view(E8M0))
    assert value[:255].tolist() == [2.0 ** (b - 127) for b in range(255)]
    assert value[255].isnan()
    assert same_bits(formats.encode_e8m0(value), byte.view(E8M0))
    assert same_bits(formats.decode_e8m0(byte), value)


@pytest.mark.parametrize("value", [0.0, -1.0, 3.0, 2.0**-128, float("inf")])
def test_encode_e8m0_refuses_other_values_than_powers_of_two(value: float) -> None:
    with pytest.raises(ValueError, match="not an E8M0 value"):
        formats.encode_e8m0(torch.tensor([1.0, value]))


def test_all_256_fp8_codes(oracle: Any) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(FP8).reshape(2, 128)
    for exponent in (-30, 0, 9):
        scale = torch.tensor([[2.0**exponent]])
        expected = torch.from_numpy(oracle.e4m3.reshape(2, 128) * 2.0**exponent).float()
        for scales in (scale, formats.encode_e8m0(scale)):
            assert torch.equal(formats.dequantize_fp8(codes, scales).nan_to_num(7e30), expected.nan_to_num(7e30))
    # -0.0 keeps its sign, and all finite codes survive the round trip.
    finite = torch.tensor([c for c in range(256) if c & 127 != 127], dtype=torch.uint8).view(FP8).reshape(2, 127)
    for dtype in (E8M0, torch.float32):
        again, scales = formats.quantize_fp8(formats.dequantize_fp8(finite, torch.ones(1, 1)), dtype)
        assert same_bits(again, finite) and scales.float().item() == 1.0


def test_all_16_fp4_codes_low_nibble_first(oracle: Any) -> None:
    codes = np.arange(16, dtype=np.uint8)
    pairs = np.stack(np.meshgrid(codes, codes), -1).reshape(8, 64)  # every pair of nibbles
    packed = torch.from_numpy(pairs[:, 0::2] | pairs[:, 1::2] << 4).view(torch.int8)
    scales = formats.encode_e8m0(torch.tensor([[0.25, 2.0]]).repeat(8, 1))
    expected = torch.from_numpy(oracle.e2m1[pairs] * np.repeat([0.25, 2.0], 32)).float()
    weight = formats.dequantize_fp4(packed, scales)
    assert torch.equal(weight, expected) and torch.equal(weight.signbit(), expected.signbit())
    assert weight[0, :4].tolist() == [0.0, 0.0, 0.125, 0.0]  # byte 0x00, then byte 0x01
    row = torch.tensor([[6.0, -6.0, *([0.0] * 30)]])
    assert formats.quantize_fp4(row)[0][0, 0].item() & 0xFF == 0xF7


def test_every_fp4_tie_goes_to_the_even_code() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    weight = torch.zeros(1, 32)
    weight[0, 0] = 6.0
    weight[0, 1:8], weight[0, 8:15] = ties, -ties
    got = formats.dequantize_fp4(*formats.quantize_fp4(weight))
    assert got[0, 1:8].tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    assert got[0, 8:15].tolist() == [-0.0, -1.0, -1.0, -2.0, -2.0, -4.0, -4.0]


def test_every_fp8_tie_goes_to_the_even_code(oracle: Any) -> None:
    table = oracle.e4m3[:127]
    middle = torch.from_numpy((table[:-1] + table[1:]) / 2).float()
    expected = torch.from_numpy(np.where(np.arange(126) % 2 == 0, table[:-1], table[1:])).float()
    weight = torch.cat([torch.tensor([448.0]), middle, -middle])[None]
    got = formats.dequantize_fp8(*formats.quantize_fp8(weight))[0]
    assert torch.equal(got[1:127], expected) and torch.equal(got[127:], -expected)


def test_the_training_rule_gives_its_documented_example() -> None:
    weight = torch.tensor([[0.3, -1.7, 5.0, 100.0]])
    codes, scales = formats.quantize_fp8(weight)
    assert scales.float().item() == 0.25
    assert formats.dequantize_fp8(codes, scales)[0].tolist() == [0.3125, -1.75, 5.0, 96.0]


@pytest.mark.parametrize("shape", SHAPES)
def test_values_follow_the_training_rule(shape: tuple[int, int], oracle: Any) -> None:
    weight = random_weight(*shape, seed=sum(shape))
    wide = weight.double().numpy()
    codes, scales = formats.quantize_fp8(weight)
    assert scales.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    theirs, their_scales = oracle.fp8(wide)
    expected = oracle.read_fp8(theirs, 2.0 ** (their_scales.astype(np.float64) - 127))
    assert np.array_equal(formats.dequantize_fp8(codes, scales).double().numpy(), expected)
    packed, groups = formats.quantize_fp4(weight)
    assert groups.shape == (shape[0], -(-shape[1] // 32))
    theirs, their_scales = oracle.fp4(wide)
    expected = oracle.read_fp4(theirs, 2.0 ** (their_scales.astype(np.float64) - 127))
    assert np.array_equal(formats.dequantize_fp4(packed, groups).double().numpy(), expected)


def test_values_follow_the_fake_quantization_of_the_model() -> None:
    from dsv4.kernels.quant import fake_quant_fp4, fake_quant_fp8

    weight = random_weight(9, 128, seed=5)
    assert torch.equal(formats.dequantize_fp4(*formats.quantize_fp4(weight)), fake_quant_fp4(weight))
    for row in weight:
        got = formats.dequantize_fp8(*formats.quantize_fp8(row[None]))
        assert torch.equal(got, fake_quant_fp8(row[None], 128))


def test_largest_code_at_half_the_range_is_stored_at_half_the_scale() -> None:
    """3.4 of 6 rounds to 3 and 230 of 448 to 224: the training rule's values, stored in the finer encoding."""
    packed, groups = formats.quantize_fp4(torch.tensor([[3.4, 0.5, -1.5, -0.0]]))
    assert groups.float().item() == 0.5 and (packed.view(torch.uint8)[0]).tolist() == [0x27, 0x8D]
    codes, scales = formats.quantize_fp8(torch.tensor([[230.0, 2.0**-9, 3 * 2.0**-9]]))
    assert scales.float().item() == 0.5 and codes.float()[0].tolist() == [448.0, 2.0**-8, 3 * 2.0**-8]
    # The ties 3.5 and 232 round up to 4 and down to 224.
    assert formats.quantize_fp4(torch.tensor([[3.5, 0.0]]))[1].float().item() == 1.0
    assert formats.quantize_fp8(torch.tensor([[232.0, 0.0]]))[1].float().item() == 0.5
    assert formats.quantize_fp8(torch.tensor([[232.1, 0.0]]))[1].float().item() == 1.0


EDGES = [0.0, -0.0, 1e-45, -1e-40, 2.0**-126, 2.0**127, -1.6e38, 448.0, 224.0, 230.0, 232.0, 6.0, 3.25, 3.5, 0.1, -7.0]
values = st.one_of(
    st.sampled_from(EDGES),
    st.floats(-1e3, 1e3, width=32),
    st.floats(-(2.0**127), 2.0**127, width=32),
)
sparse_matrices = st.tuples(
    st.sampled_from([(1, 2), (2, 34), (129, 64), (5, 130)]),
    st.lists(st.tuples(st.integers(0, 10_000), values), max_size=40),
    st.sampled_from([0.0, 1.0, 2.0**-100, 2.0**-130]),
)


def build(matrix: tuple[tuple[int, int], list[tuple[int, float]], float]) -> torch.Tensor:
    (rows, columns), entries, noise = matrix
    weight = random_weight(rows, columns, seed=len(entries)) * noise
    for place, value in entries:
        weight.view(-1)[place % weight.numel()] = value
    return weight


@settings(max_examples=150, deadline=None)
@given(sparse_matrices)
def test_quantize_dequantize_quantize_gives_the_same_bytes(matrix: Any) -> None:
    weight = build(matrix)
    codes, scales = formats.quantize_fp4(weight)
    again = formats.quantize_fp4(formats.dequantize_fp4(codes, scales))
    assert same_bits(again[0], codes) and same_bits(again[1], scales)
    for dtype in (E8M0, torch.float32):
        codes, scales = formats.quantize_fp8(weight, dtype)
        read = formats.dequantize_fp8(codes, scales)
        assert read.isfinite().all()
        again = formats.quantize_fp8(read, dtype)
        assert same_bits(again[0], codes) and same_bits(again[1], scales)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([(2, 6), (130, 34), (128, 256)]))
def test_any_codes_and_power_of_two_scales_keep_their_values(seed: int, shape: tuple[int, int]) -> None:
    """Also for scales that our rules would not choose; and one pass reaches the fixed point."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    codes[codes & 127 == 127] = 0x80
    grid = -(-shape[0] // 128), -(-shape[1] // 128)
    scales = torch.randint(20, 240, grid, dtype=torch.uint8, generator=generator).view(E8M0)
    weight = formats.dequantize_fp8(codes.view(FP8), scales)
    for dtype in (E8M0, torch.float32):
        assert torch.equal(formats.dequantize_fp8(*formats.quantize_fp8(weight, dtype)), weight)
    packed = torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)
    groups = torch.randint(0, 250, (shape[0], -(-shape[1] // 16)), dtype=torch.uint8, generator=generator).view(E8M0)
    weight = formats.dequantize_fp4(packed, groups)
    assert torch.equal(formats.dequantize_fp4(*formats.quantize_fp4(weight)), weight)


@pytest.mark.parametrize("seed", range(8))
def test_base_weights_with_f32_scales_keep_their_values_and_codes(seed: int, oracle: Any) -> None:
    """Scales amax / 448 with all 24 bits: code * scale was rounded on reading, and is still recovered."""
    codes, scales = oracle.fp8_f32(random_weight(140, 270, seed, spread=1.0).double().numpy())
    codes, scales = torch.from_numpy(codes).view(FP8), torch.from_numpy(scales)
    weight = formats.dequantize_fp8(codes, scales)
    again, found = formats.quantize_fp8(weight, torch.float32)
    assert torch.equal(formats.dequantize_fp8(again, found), weight)
    assert same_bits(again, codes)


def test_scales_are_kept_if_they_reproduce_the_weight_exactly() -> None:
    weight = torch.tensor([[3.0, 0.5, -1.0, -0.0]])
    for exponent, kept in ((0.0, True), (-1.0, True), (1.0, False), (-2.0, False)):
        scales = formats.encode_e8m0(torch.tensor([[2.0**exponent]]))
        packed, groups = formats.quantize_fp4(weight, keep=scales)
        assert same_bits(groups, scales) == kept
        assert torch.equal(formats.dequantize_fp4(packed, groups), weight)
        assert packed.view(torch.uint8)[0, 1] >> 4 == 8
    for scale, kept in ((0.5, True), (1 / 3, False), (2.0**-10, False), (0.0, False)):
        codes, scales = formats.quantize_fp8(weight, torch.float32, keep=torch.tensor([[scale]]))
        assert (scales.item() == scale) == kept
        assert torch.equal(formats.dequantize_fp8(codes, scales), weight)
    wrong_shape = torch.ones(2, 1)
    assert formats.quantize_fp8(weight, torch.float32, keep=wrong_shape)[1].shape == (1, 1)


def test_f32_scales_of_new_weights_use_the_whole_range() -> None:
    weight = random_weight(128, 256, 3, spread=0.0)
    codes, scales = formats.quantize_fp8(weight, torch.float32)
    amax = weight.abs().unflatten(1, (2, 128)).amax((0, 2))
    assert torch.equal(scales[0], amax / 448) and codes.float().abs().max() == 448.0
    assert (formats.dequantize_fp8(codes, scales) - weight).abs().max() <= amax.max() / 448 * 16.01


def test_f32_scales_are_recovered_from_blocks_of_one_or_two_values() -> None:
    """In such blocks several scales can give the rounded products code * scale."""
    weight = torch.zeros(1, 2000 * 128)
    generator = torch.Generator().manual_seed(2)
    weight[0, ::128] = torch.randn(2000, generator=generator).exp()
    weight[0, 1::128] = torch.randn(2000, generator=generator) * (torch.arange(2000) % 4 > 0)
    codes, scales = formats.quantize_fp8(weight, torch.float32)
    again = formats.quantize_fp8(formats.dequantize_fp8(codes, scales), torch.float32)
    assert same_bits(again[0], codes) and same_bits(again[1], scales)


def test_all_zero_blocks_and_negative_zero_keep_their_codes() -> None:
    weight = torch.zeros(3, 64)
    weight[1] = -0.0
    packed, groups = formats.quantize_fp4(weight)
    assert (groups.view(torch.uint8) == 1).all() and packed.view(torch.uint8)[1].tolist() == [0x88] * 32
    codes, scales = formats.quantize_fp8(weight)
    assert scales.view(torch.uint8).item() == 127 - 22 and (codes.view(torch.uint8)[1] == 0x80).all()
    assert formats.dequantize_fp8(codes, scales)[1].signbit().all()


@pytest.mark.parametrize("dtype", [torch.float32, E8M0])
def test_fp4_to_fp8_is_exact_up_to_a_factor_2_to_14(dtype: torch.dtype, oracle: Any) -> None:
    generator = np.random.default_rng(1)
    packed = generator.integers(0, 256, (128, 96), dtype=np.uint8)
    packed[0, :8], packed[127, 95] = 0x77, 0x11  # the largest and the smallest code in groups of extreme scale
    scales = generator.integers(100, 115, (128, 6), dtype=np.uint8)
    scales[0, 0], scales[127, 5] = 114, 100
    weight = oracle.read_fp4(packed, 2.0 ** (scales.astype(np.float64) - 127))
    arguments = torch.from_numpy(packed).view(torch.int8), torch.from_numpy(scales).view(E8M0)
    codes, block_scales = formats.fp4_to_fp8(*arguments, dtype)
    assert codes.dtype == FP8 and block_scales.dtype == dtype and block_scales.shape == (1, 2)
    assert np.array_equal(formats.dequantize_fp8(codes, block_scales).double().numpy(), weight)
    # The usual choice, largest group scale / 2^6.
    assert block_scales.float()[0, 0].item() == 2.0 ** (114 - 127 - 6)


def test_fp4_to_fp8_refuses_scales_too_far_apart() -> None:
    packed = torch.full((130, 80), 0x17, dtype=torch.int8)  # 6, then 0.5
    scales = torch.full((130, 5), 127, dtype=torch.uint8)
    scales[129, 4] = 127 - 15
    with pytest.raises(ValueError, match=r"block \(1, 1\) .* 3\.05\d+e-05 to 1\.0; .*2\^14"):
        formats.fp4_to_fp8(packed, scales.view(E8M0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -3.4e38])
def test_values_without_a_code_are_refused(bad: float) -> None:
    weight = torch.ones(2, 64)
    weight[1, 3] = bad
    for quantize in (formats.quantize_fp8, formats.quantize_fp4, lambda w: formats.quantize_fp8(w, torch.float32)):
        with pytest.raises(ValueError, match="NaN, infinity"):
            quantize(weight)


def test_invalid_shapes_and_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match="3 columns"):
        formats.quantize_fp4(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"\(1, 2\); the codes need \(2, 1\)"):
        formats.dequantize_fp8(torch.ones(129, 4).to(FP8), torch.ones(1, 2))
    with pytest.raises(ValueError, match="is a matrix"):
        formats.quantize_fp8(torch.ones(3))
    with pytest.raises(ValueError, match=r"allowed: torch\.int8"):
        formats.dequantize_fp4(torch.ones(2, 4), torch.ones(2, 1))
    with pytest.raises(ValueError, match="scale_dtype"):
        formats.quantize_fp8(torch.ones(2, 2), torch.float16)


def test_nan_scale_gives_nan() -> None:
    scales = torch.tensor([[255]], dtype=torch.uint8).view(E8M0)
    assert formats.dequantize_fp8(torch.zeros(2, 2).to(FP8), scales).isnan().all()
    assert formats.dequantize_fp4(torch.zeros(1, 2, dtype=torch.int8), scales).isnan().all()


def test_neither_strips_nor_bf16_input_change_the_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strip boundaries have no effect, and BF16 weights quantize like the same values in float32."""
    weight = random_weight(300, 70, 9).bfloat16()
    whole = formats.quantize_fp8(weight.float()), formats.quantize_fp4(weight.float())
    monkeypatch.setattr(formats, "_STRIP_ELEMENTS", 1000)
    parts = formats.quantize_fp8(weight), formats.quantize_fp4(weight)
    for (codes, scales), (their_codes, their_scales) in zip(whole, parts, strict=True):
        assert same_bits(codes, their_codes) and same_bits(scales, their_scales)
    assert same_bits(formats.dequantize_fp4(*whole[1]), formats.dequantize_fp4(*parts[1]))
