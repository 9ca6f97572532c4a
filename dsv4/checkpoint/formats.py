"""Number formats of the official checkpoints: FP8 e4m3fn in 128x128 blocks, FP4 e2m1 in groups of 32, E8M0 scales.

A stored weight is a table of codes and a table of scales that multiply them; the last block of a row or column may be
shorter. Scales are E8M0 (a power of two: byte b is 2^(b - 127), 255 is NaN) or, in the Base models, F32.

Values follow the model's training rule: scale = 2^ceil(log2(amax / largest)), codes rounded to nearest, ties to the
even code (official inference kernel). The rule allows two encodings of a block whose largest element rounds down to
half the range (224 of 448, 3 of 6): the coarse one, and half the scale with doubled codes. The quantizers here always
choose the second, so that quantize(dequantize(x)) returns x's codes and scales for every x that they wrote. To
reproduce the encoding of another writer they accept the scales to keep.
A weight stored with F32 scales and without an exact power-of-two form uses scale = amax / 448; see `_fp32_scales`.

All functions work in row strips: beside input and output they hold some tens of MB.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from dsv4.analysis.inventory import FP4_GROUP, FP8_BLOCK
from dsv4.kernels.quant import FP4_MAX, FP8_MAX

# Scale exponents of blocks whose codes are all zero, from the training rule's floors on amax (1e-4, 6 * 2^-126).
_ZERO_EXPONENT = {FP8_MAX: -22, FP4_MAX: -126}
_SMALLEST_CODE = {FP8_MAX: 2.0**-9, FP4_MAX: 0.5}
# A largest element between half the range and this rounds down to half the range (232 itself is a tie that goes to the
# even code of 224; 3.5 is a tie that goes up to 4).
_MIDPOINT = {FP8_MAX: 232.0, FP4_MAX: 3.5}
_LOWEST_EXPONENT = -127  # E8M0 byte 0

_STRIP_ELEMENTS = 1 << 21

_E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def decode_e8m0(scales: Tensor) -> Tensor:
    """E8M0 (float8_e8m0fnu, or the same bytes as uint8) -> float32; byte 255 -> NaN."""
    return scales.view(torch.float8_e8m0fnu).to(torch.float32)


def encode_e8m0(values: Tensor) -> Tensor:
    """Exact powers of two from 2^-127 to 2^127, or NaN -> float8_e8m0fnu. ValueError on any other value."""
    values = values.to(torch.float32)
    codes = values.to(torch.float8_e8m0fnu)
    wrong = (decode_e8m0(codes) != values) & ~values.isnan()
    if wrong.any():
        raise ValueError(f"{values[wrong][0].item()!r} is not an E8M0 value; allowed: 2^-127 to 2^127 and NaN")
    return codes


def quantize_fp8(
    weight: Tensor, scale_dtype: torch.dtype = torch.float8_e8m0fnu, keep: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Float [out, in] -> (float8_e4m3fn [out, in], scales [ceil(out/128), ceil(in/128)] in `scale_dtype`).

    `scale_dtype`: float8_e8m0fnu or float32. `keep`: scales to use if they reproduce `weight` exactly, such as those it
    was read with. ValueError on NaN, infinity and magnitudes above 2^127.
    """
    if scale_dtype not in (torch.float8_e8m0fnu, torch.float32):
        raise ValueError(f"scale_dtype = {scale_dtype} is not allowed; allowed: torch.float8_e8m0fnu, torch.float32")
    rows, columns = _matrix_shape(weight)
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=weight.device)
    grid = -(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)
    scales = torch.empty(grid, dtype=scale_dtype, device=weight.device)
    if keep is not None and keep.dtype == scale_dtype and tuple(keep.shape) == grid:
        keep = keep.to(weight.device)
        factors = _scale_grid(keep, *grid)
        for strip in _strips(rows, columns, FP8_BLOCK):
            blocks = _blocks(weight[strip], FP8_BLOCK, FP8_BLOCK)
            rounded = _round_fp8(blocks / _spread(factors[_block_rows(strip)]))
            codes[strip] = rounded.flatten(2).flatten(0, 1)[: strip.stop - strip.start, :columns].to(codes.dtype)
        if torch.equal(dequantize_fp8(codes, keep).to(weight.dtype), weight):
            return codes, keep
    for strip in _strips(rows, columns, FP8_BLOCK):
        blocks = _blocks(weight[strip], FP8_BLOCK, FP8_BLOCK)
        if scale_dtype == torch.float32:
            rounded, scale = _fp32_scales(blocks)
        else:
            exponent, half = _exponent(_amax(blocks), FP8_MAX)
            rounded = _round_fp8(blocks / _spread(_two_to(exponent))) * _spread(1.0 + half)
            scale = _two_to(exponent - half.int()).to(scale_dtype)
        codes[strip] = rounded.flatten(2).flatten(0, 1)[: strip.stop - strip.start, :columns].to(codes.dtype)
        scales[_block_rows(strip)] = scale
    return codes, scales


def dequantize_fp8(codes: Tensor, scales: Tensor) -> Tensor:
    """(float8_e4m3fn [out, in], E8M0 or float32 scales [ceil(out/128), ceil(in/128)]) -> float32 [out, in]."""
    if codes.dtype != torch.float8_e4m3fn:
        raise ValueError(f"codes have dtype {codes.dtype}; allowed: torch.float8_e4m3fn")
    rows, columns = _matrix_shape(codes)
    factors = _scale_grid(scales, -(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))
    weight = codes.to(torch.float32)
    _multiply_blocks(weight, factors, FP8_BLOCK, FP8_BLOCK)
    return weight


def quantize_fp4(weight: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Float [out, in], in even -> (int8 [out, in/2], float8_e8m0fnu [out, ceil(in/32)]).

    Byte k of a row holds column 2k in its low nibble and 2k + 1 in its high one; bit 3 of a nibble is the sign.
    `keep`: scales to use if they reproduce `weight` exactly, such as those it was read with.
    ValueError on NaN, infinity and magnitudes above 2^127.
    """
    rows, columns = _matrix_shape(weight)
    if columns % 2:
        raise ValueError(f"FP4 packs two columns in a byte: {columns} columns are not allowed; allowed: an even number")
    packed = torch.empty(rows, columns // 2, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(rows, -(-columns // FP4_GROUP), dtype=torch.float8_e8m0fnu, device=weight.device)
    if keep is not None and keep.shape == scales.shape:
        keep = keep.to(weight.device)
        factors = decode_e8m0(keep)
        for strip in _strips(rows, columns, 1):
            groups = _blocks(weight[strip], 1, FP4_GROUP)
            packed[strip] = _pack_fp4(_round_fp4(groups / _spread(factors[strip])), groups, columns)
        if torch.equal(dequantize_fp4(packed.view(torch.int8), keep).to(weight.dtype), weight):
            return packed.view(torch.int8), keep
    for strip in _strips(rows, columns, 1):
        groups = _blocks(weight[strip], 1, FP4_GROUP)
        exponent, half = _exponent(_amax(groups), FP4_MAX)
        codes = _round_fp4(groups / _spread(_two_to(exponent)))
        # Twice the value: code 1 becomes 2, and 2 to 5 become 4 to 7.
        codes += ((codes > 0).to(torch.uint8) + (codes > 1)) * _spread(half)
        packed[strip] = _pack_fp4(codes, groups, columns)
        scales[strip] = _two_to(exponent - half.int()).to(scales.dtype)
    return packed.view(torch.int8), scales


def dequantize_fp4(packed: Tensor, scales: Tensor) -> Tensor:
    """(int8 [out, in/2], E8M0 scales [out, ceil(in/32)]) -> float32 [out, in]."""
    if packed.dtype != torch.int8:
        raise ValueError(f"packed FP4 codes have dtype {packed.dtype}; allowed: torch.int8")
    rows, half_columns = _matrix_shape(packed)
    factors = _scale_grid(scales, rows, -(-half_columns * 2 // FP4_GROUP))
    weight = torch.empty(rows, half_columns * 2, dtype=torch.float32, device=packed.device)
    magnitudes = torch.tensor(_E2M1_MAGNITUDES, device=packed.device)
    values = torch.cat([magnitudes, -magnitudes])
    byte = torch.arange(256, device=packed.device)
    # Both values of each byte, low nibble first, as one eight-byte element per pair, which gathers faster.
    pairs = torch.stack([values[byte & 15], values[byte >> 4]], 1).view(torch.int64).flatten()
    for strip in _strips(rows, half_columns, 1):
        weight[strip] = pairs[packed[strip].view(torch.uint8).int()].view(torch.float32)
    _multiply_blocks(weight, factors, 1, FP4_GROUP)
    return weight


def fp4_to_fp8(packed: Tensor, scales: Tensor, scale_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Re-encode FP4 groups as FP8 blocks without changing a value; arguments of dequantize_fp4, result of quantize_fp8.

    Always possible if the group scales within each 128x128 block lie within a factor 2^14 of one another.
    ValueError names the first block in which a value would change.
    """
    weight = dequantize_fp4(packed, scales)
    codes, block_scales = quantize_fp8(weight, scale_dtype)
    changed = dequantize_fp8(codes, block_scales).ne_(weight)
    if changed.any():
        row, column = (int(i) // FP8_BLOCK for i in changed.nonzero()[0])
        group = decode_e8m0(scales)[row * FP8_BLOCK :, column * FP8_BLOCK // FP4_GROUP :]
        group = group[:FP8_BLOCK, : FP8_BLOCK // FP4_GROUP]
        raise ValueError(
            f"FP4 values of block ({row}, {column}) have no exact FP8 form: its group scales range from "
            f"{group.min().item()!r} to {group.max().item()!r}; allowed: within a factor 2^14"
        )
    return codes, block_scales


def _matrix_shape(weight: Tensor) -> tuple[int, int]:
    if weight.dim() != 2:
        raise ValueError(f"a quantized weight is a matrix; shape {tuple(weight.shape)} is not allowed")
    return weight.shape[0], weight.shape[1]


def _scale_grid(scales: Tensor, rows: int, columns: int) -> Tensor:
    if tuple(scales.shape) != (rows, columns):
        raise ValueError(f"scales have shape {tuple(scales.shape)}; the codes need {(rows, columns)}")
    return scales if scales.dtype == torch.float32 else decode_e8m0(scales)


def _strips(rows: int, columns: int, block_rows: int) -> Iterator[slice]:
    """Cut the rows into runs of whole blocks of about _STRIP_ELEMENTS elements."""
    step = max(1, _STRIP_ELEMENTS // max(1, columns) // block_rows) * block_rows
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def _block_rows(strip: slice) -> slice:
    """Rows of the scale grid for a strip of FP8 blocks."""
    return slice(strip.start // FP8_BLOCK, -(-strip.stop // FP8_BLOCK))


def _blocks(strip: Tensor, block_rows: int, block_columns: int) -> Tensor:
    """[rows, columns] -> float32 [row blocks, block_rows, column blocks, block_columns], zeros beyond the edges."""
    pad_rows, pad_columns = -strip.shape[0] % block_rows, -strip.shape[1] % block_columns
    strip = strip.to(torch.float32)
    if pad_rows or pad_columns:
        strip = torch.nn.functional.pad(strip, (0, pad_columns, 0, pad_rows))
    return strip.reshape(strip.shape[0] // block_rows, block_rows, strip.shape[1] // block_columns, block_columns)


def _spread(per_block: Tensor) -> Tensor:
    """[row blocks, column blocks] -> broadcastable against the four dimensions of `_blocks`."""
    return per_block[:, None, :, None]


def _amax(blocks: Tensor) -> Tensor:
    """Largest magnitude of each block; ValueError on NaN, infinity and values that could round up to infinity."""
    amax = blocks.abs().amax((1, 3))
    if not (amax <= 2.0**127).all():
        raise ValueError("the weight holds NaN, infinity or a magnitude above 2^127, which are not allowed")
    return amax


def _two_to(exponent: Tensor) -> Tensor:
    """2^exponent as float32, exactly, for -127 to 127."""
    return decode_e8m0((exponent + 127).to(torch.uint8))


def _exponent(amax: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """(the training rule's exponent ceil(log2(amax / largest)), bool: the largest code falls to half the range).

    In the second case the block is stored with half the scale and doubled codes. Computed without a logarithm, which
    could round across an integer.
    """
    mantissa, exponent = torch.frexp(amax)  # amax = mantissa * 2^exponent, mantissa in [0.5, 1)
    top = torch.frexp(torch.tensor(largest))
    exponent = exponent - int(top.exponent) + (mantissa > top.mantissa.item()).int()
    exponent = exponent.clamp(min=_LOWEST_EXPONENT)
    scaled = amax / _two_to(exponent)
    half = scaled < _MIDPOINT[largest] if largest == FP4_MAX else scaled <= _MIDPOINT[largest]
    half &= exponent > _LOWEST_EXPONENT
    vanishes = scaled <= _SMALLEST_CODE[largest] / 2
    return torch.where(vanishes, _ZERO_EXPONENT[largest], exponent), half & ~vanishes


def _round_fp8(scaled: Tensor) -> Tensor:
    """Nearest e4m3fn value, ties to the even code, clamped to 448; float32 in and out."""
    return scaled.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).to(torch.float32)


def _round_fp4(scaled: Tensor) -> Tensor:
    """Code 0 to 7 (uint8) of the nearest e2m1 magnitude, ties to the even code, clamped to 6."""
    magnitude = scaled.abs()
    codes = torch.zeros_like(magnitude, dtype=torch.uint8)
    for low_code, (low, high) in enumerate(pairwise(_E2M1_MAGNITUDES)):
        middle = (low + high) / 2
        codes += magnitude > middle if low_code % 2 == 0 else magnitude >= middle
    return codes


def _pack_fp4(codes: Tensor, groups: Tensor, columns: int) -> Tensor:
    """Magnitude codes, and the values that give their signs, both as from `_blocks` -> bytes [rows, columns / 2]."""
    codes = codes | groups.signbit().to(torch.uint8) << 3
    nibbles = codes.flatten(2).flatten(0, 1)[:, :columns]
    return nibbles[:, 0::2] | nibbles[:, 1::2] << 4


def _fp32_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks -> (e4m3fn values as float32, float32 scales), as `quantize_fp8` stores them with F32 scales.

    1. A block that some scale reproduces exactly keeps its values. Candidates: first a power of two (as in FP8 and FP4
       weights of instruct models), then amax / 448 and its two neighbors (as in Base weights; the product 448 * scale
       was rounded when the weight was read, so the quotient can miss the scale by one unit in the last place).
    2. Any other block gets amax / 448. From values read back, step 1 finds this scale again: rounding 448 * scale, a
       product with 7, moves the quotient by less than half a unit.
    """
    amax = _amax(blocks)
    ratio = amax / FP8_MAX
    ulp_down = torch.nextafter(ratio, torch.zeros_like(amax))
    ulp_up = torch.nextafter(ratio, torch.full_like(amax, torch.inf))
    power_of_two = _two_to(_exponent(amax, FP8_MAX)[0])
    scale = power_of_two
    done = _reproduces(blocks, scale)
    for candidate in (ratio, ulp_down, ulp_up):
        if done.all():
            break
        scale = torch.where(done, scale, candidate)
        done |= _reproduces(blocks, scale)
    if not done.all():
        # Far below any weight's magnitude, quotients lose bits; this floor is a power of two and exact.
        scale = torch.where(done, scale, ratio.clamp(min=2.0**-120))
        blocks = torch.where(_spread(done), blocks, _round_fp8(blocks / _spread(scale)) * _spread(scale))
        power_of_two = _two_to(_exponent(_amax(blocks), FP8_MAX)[0])
        scale = torch.where(~done & _reproduces(blocks, power_of_two), power_of_two, scale)
    return _round_fp8(blocks / _spread(scale)), scale


def _reproduces(blocks: Tensor, scale: Tensor) -> Tensor:
    """Bool per block: True if code * scale reproduces every value; False for a scale of zero."""
    fits = scale > 0
    for part in (blocks[:, :1], blocks):  # the first rows settle it cheaply if no block reproduces them
        again = _round_fp8(part / _spread(scale)) * _spread(scale)
        fits &= (again == part).all(3).all(1)
        if not fits.any():
            break
    return fits


def _multiply_blocks(weight: Tensor, factors: Tensor, block_rows: int, block_columns: int) -> None:
    """Multiply each block of `weight` by its factor in place; the last blocks of rows and columns may be shorter."""
    rows, columns = weight.shape
    for row, height in ((0, block_rows), (rows - rows % block_rows, rows % block_rows)):
        for column, width in ((0, block_columns), (columns - columns % block_columns, columns % block_columns)):
            high = (rows - row) // height * height if height else 0
            wide = (columns - column) // width * width if width else 0
            if high and wide:
                part = weight[row : row + high, column : column + wide]
                grid = factors[row // block_rows :, column // block_columns :][: high // height, : wide // width]
                blocks = part.view(high // height, height, wide // width, width)
                blocks *= _spread(grid)
