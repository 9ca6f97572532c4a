"""Numbers that the products of layers and experts multiply: fp32, or both factors rounded to BF16 or FP8; fp32 sums.

The choice of the forward holds for its backward. Values, gradients and parameters stay fp32, and so do all operations
but `linear` and `grouped_linear`; the gradients of the head in `cross_entropy` multiply BF16 numbers where the
instruction set has products of them (avx512_bf16).

- bf16: factors are rounded to nearest, ties to even. Magnitudes below 2^-56 count as zero, so that products and sums
  have the same bits on every instruction set with fused multiply-add; gradients may keep them.
- fp8: as DeepSeek-V3 trains, with power-of-two scales: e4m3, weights in blocks of 128 x 128, rows of the forward and of
  dx in tiles of 128 channels, both factors of dW in tiles of 128 tokens, x after its rounding in the forward.
  Simulated: an FP8 number is exact in BF16, and BF16 products multiply it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dsv4.analysis.inventory import FP8_BLOCK
from dsv4.analysis.precision import PRECISIONS, Precision
from dsv4.kernels import backends, cpu
from dsv4.kernels.quant import FP8_MAX, fake_quant_fp8, fake_quant_fp8_blocks
from dsv4.kernels.stored import StoredStack, StoredTensor, StoredWeight, rows_argument, widen_bf16, widened

LEAST_FACTOR = 2.0**-56
_GRADIENT_FLOOR = FP8_MAX * 2.0**-126  # least amax of a tile of gradients, which may be far below an activation's


@dataclass
class _Choice:
    precision: Precision
    # Rounded weights by address and by the tensor that they are (a part of), held here so that its id stays its own. An
    # address alone would not do: sharded weights are gathered anew for each block, at addresses that another block's
    # weights had before. Nor would an id: a tensor can be given other memory (`.data =`).
    weights: dict[tuple[int, int, tuple[int, ...], tuple[int, ...], int], tuple[Tensor, Tensor]] = field(
        default_factory=dict
    )


_choice: ContextVar[_Choice | None] = ContextVar("precision", default=None)


@contextmanager
def precision(name: Precision) -> Iterator[None]:
    """Products in this context multiply numbers of `name`. Each weight is rounded once."""
    if name not in PRECISIONS:
        raise ValueError(f"precision {name!r}: allowed are {', '.join(PRECISIONS)}")
    token = _choice.set(_Choice(name))
    try:
        yield
    finally:
        _choice.reset(token)


def current() -> Precision:
    """Precision of the innermost context, or fp32."""
    choice = _choice.get()
    return choice.precision if choice is not None else "fp32"


def multiplies_bf16() -> bool:
    """True if the kernels of gradients round their factors to BF16 themselves, on the selected instruction set."""
    native = backends.native_module()
    return native is not None and native.has_bf16_gradients()


def round_factors(x: Tensor) -> Tensor:
    """x [..., n] rounded to BF16 -> like x, with magnitudes below LEAST_FACTOR as zero."""
    if x.dtype == torch.float32 and backends.native_module() is not None and x.device.type == "cpu":
        rows = rows_argument(x)
        rounded = torch.empty(rows.shape, dtype=torch.float32)
        cpu.kernels().round_factors(rows, rounded)
        return rounded.view(x.shape)
    rounded = x.to(torch.bfloat16).to(x.dtype)
    return rounded.masked_fill_(rounded.abs() < LEAST_FACTOR, 0.0)


def forward_rows(x: Tensor, name: Precision) -> Tensor:
    """Rows [..., n] as the forward multiplies them."""
    return round_factors(x) if name == "bf16" else fake_quant_fp8(x, FP8_BLOCK)


def forward_weights(weight: Tensor) -> Tensor:
    """A weight [out, in] or stack [E, out, in] as forward and dx multiply it, in 16 bits, kept while the context lasts.

    Stored weights (kernels/stored.py) stay as they are in bf16: FP4, FP8 and BF16 numbers are exact.
    """
    choice = _choice.get()
    assert choice is not None
    if isinstance(weight, StoredWeight) and choice.precision == "bf16":
        return weight
    if isinstance(weight, StoredWeight):
        return _pack(widened(weight), choice.precision)
    owner = weight if weight._base is None else weight._base
    key = (id(owner), weight.data_ptr(), tuple(weight.shape), weight.stride(), weight._version)
    if key not in choice.weights:
        choice.weights[key] = owner, _pack(weight.detach(), choice.precision)
    return choice.weights[key][1]


def pack_bf16(weight: Tensor) -> Tensor:
    """fp32 [rows, in] -> its rounded factors, bfloat16."""
    packed = torch.empty(weight.shape, dtype=torch.bfloat16, device=weight.device)
    if weight.dtype == torch.float32 and backends.native_module() is not None and weight.device.type == "cpu":
        cpu.kernels().pack_factors(rows_argument(weight), packed.view(torch.int16))
        return packed
    return packed.copy_(round_factors(weight))


def stored_bf16(weight: Tensor) -> StoredTensor:
    """fp32 [out, in] -> its rounded factors as a stored weight."""
    return StoredTensor("bf16", pack_bf16(weight), None, widen_bf16)


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """a [n, k] @ b [k, m] of numbers that are exact in BF16, summed in fp32: on CUDA by BF16 products."""
    if a.device.type == "cuda" and a.dtype == torch.float32:
        return torch.mm(a.to(torch.bfloat16), b.to(torch.bfloat16), out_dtype=torch.float32)
    return a @ b


def gradient_rows(dy: Tensor, name: Precision) -> Tensor:
    """Rows [n, out] of a gradient as dx = dy W multiplies them."""
    return round_factors(dy) if name == "bf16" else fake_quant_fp8(dy, FP8_BLOCK, _GRADIENT_FLOOR)


def weight_gradient_factors(dy: Tensor, x: Tensor, sizes: Sequence[int], name: Precision) -> tuple[Tensor, Tensor]:
    """Gradient [n, out] and input [n, in] as dW = dy^T x multiplies them; a group of `sizes` rows has its own tiles."""
    if name == "bf16":
        return round_factors(dy), round_factors(x)
    return _tile_tokens(dy, sizes, _GRADIENT_FLOOR), _tile_tokens(forward_rows(x, name), sizes, _GRADIENT_FLOOR)


def _tile_tokens(x: Tensor, sizes: Sequence[int], floor: float) -> Tensor:
    """x [n, width] rounded to FP8 in tiles of 128 rows of one channel, which end with a group."""
    parts = [fake_quant_fp8(part.t().contiguous(), FP8_BLOCK, floor).t() for part in x.split(list(sizes)) if len(part)]
    return torch.cat(parts).contiguous() if parts else x


def _pack(weight: Tensor, name: Precision) -> Tensor:
    if name == "fp8":
        matrices = [fake_quant_fp8_blocks(matrix) for matrix in (weight if weight.dim() == 3 else weight.unsqueeze(0))]
        weight = torch.stack(matrices).view(weight.shape)
    packed = pack_bf16(weight.reshape(-1, weight.shape[-1]))
    if weight.dim() == 2:
        return StoredTensor("bf16", packed, None, widen_bf16)
    return StoredStack([StoredTensor("bf16", codes, None, widen_bf16) for codes in packed.view(weight.shape)])
