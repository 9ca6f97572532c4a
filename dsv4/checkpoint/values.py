"""Check that every stored value is finite, on the bits, at about the speed of reading them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv4.checkpoint.errors import CheckpointError
from dsv4.checkpoint.folder import Checkpoint
from dsv4.kernels.quant.reference import FP4_MAX, FP8_MAX

# Integer types of the same width, and the smallest bit pattern, sign aside, of NaN or infinity.
_SIGNED: dict[torch.dtype, tuple[type[np.signedinteger[Any]], type[np.unsignedinteger[Any]], int]] = {
    torch.float8_e4m3fn: (np.int8, np.uint8, 0x7F),
    torch.bfloat16: (np.int16, np.uint16, 0x7F80),
    torch.float16: (np.int16, np.uint16, 0x7C00),
    torch.float32: (np.int32, np.uint32, 0x7F80_0000),
}
_E8M0_NAN = 255
_CHUNK_BYTES = 1 << 19  # stays in a core's own cache between its two passes
_LARGEST_CODE = {torch.int8: FP4_MAX, torch.float8_e4m3fn: FP8_MAX}
_LARGEST_FLOAT32 = torch.finfo(torch.float32).max


def check_values(checkpoint: Checkpoint, name: str) -> None:
    """CheckpointError if codes, scales or their products in an official parameter are not finite.

    The error names the stored tensor and the index of its first non-finite element.
    """
    codes, scales = checkpoint.stored(name), checkpoint.scale(name)
    _check(checkpoint, name, codes)
    if scales is None:
        return
    scale_name = name.removesuffix("weight") + "scale"
    _check(checkpoint, scale_name, scales)
    if _largest(scales) * _LARGEST_CODE[codes.dtype] > _LARGEST_FLOAT32:
        values = checkpoint.parameter(name)
        place = first_not_finite(values)
        if place is not None:
            file, stored = checkpoint.place(name)
            found = f"a product beyond it at {_unravel(place, tuple(values.shape))}"
            raise CheckpointError(file, f"codes whose products with {scale_name} stay within float32", found, stored)


def first_not_finite(tensor: Tensor) -> int | None:
    """Index of the first NaN or infinity in the flattened tensor (CPU, contiguous), None if all values are finite.

    Integers (FP4 codes among them) are always finite.
    """
    flat = tensor.detach().reshape(-1)
    if flat.dtype == torch.float8_e8m0fnu:
        return _first(flat.view(torch.uint8).numpy(), None, _E8M0_NAN)
    if flat.dtype not in _SIGNED:
        return None
    signed, unsigned, limit = _SIGNED[flat.dtype]
    bits = flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0, np.uint8)
    return _first(bits.view(unsigned), signed, limit)


def _first(bits: np.ndarray[Any, Any], signed: type[np.signedinteger[Any]] | None, limit: int) -> int | None:
    """Index of the first non-finite value, by the maxima of `bits` as unsigned (negative values) and as signed."""
    negative = limit if signed is None else limit + (1 << 8 * bits.itemsize - 1)
    step = _CHUNK_BYTES // bits.itemsize
    for start in range(0, bits.size, step):
        chunk = bits[start : start + step]
        if chunk.max() >= negative or (signed is not None and chunk.view(signed).max() >= limit):
            wrong = chunk >= negative
            if signed is not None:
                wrong |= chunk.view(signed) >= limit
            return start + int(wrong.argmax())
    return None


def _check(checkpoint: Checkpoint, name: str, tensor: Tensor) -> None:
    place = first_not_finite(tensor)
    if place is None:
        return
    file, stored = checkpoint.place(name)
    index = _unravel(place, tuple(tensor.shape))
    value = tensor[tuple(index)]
    found = f"{value.float().item()} at {checkpoint.index(name, index)}"
    if value.dtype.itemsize == 1:
        found += f" (code 0x{value.view(torch.uint8).item():02X})"
    raise CheckpointError(file, "finite numbers", found, stored)


def _largest(scales: Tensor) -> float:
    if scales.dtype == torch.float32:
        return float(scales.abs().max())
    return 2.0 ** (int(scales.view(torch.uint8).numpy().max()) - 127)


def _unravel(place: int, shape: tuple[int, ...]) -> list[int]:
    return [int(i) for i in np.unravel_index(place, shape)]
