"""Plain torch definition of FP8 and FP4 fake quantization."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.analysis.inventory import FP4_GROUP, FP8_BLOCK

FP8_MAX = 448.0
FP8_FLOOR = 1e-4  # least amax of a block of activations
FP4_MAX = 6.0


def power_of_two_scale(amax: Tensor, largest: float) -> Tensor:
    """2^ceil(log2(amax / largest)), exactly, from the fp32 bits: a logarithm could round across a power of two.

    An amax that is infinite or NaN is its own scale.
    """
    ratio = amax.float() * (1.0 / largest)
    mantissa, exponent = torch.frexp(ratio)  # ratio = mantissa * 2^exponent, mantissa in [0.5, 1)
    scale = torch.ldexp(torch.ones_like(ratio), exponent - (mantissa == 0.5).int())
    return torch.where(ratio.isfinite(), scale, ratio)


def _blocks(x: Tensor, block: int) -> tuple[Tensor, int]:
    pad = -x.shape[-1] % block
    if pad:
        x = torch.nn.functional.pad(x, (0, pad))
    return x.unflatten(-1, (-1, block)), pad


def _fake_quant(x: Tensor, block: int, largest: float, floor: float) -> Tensor:
    blocks, pad = _blocks(x.float(), block)
    scale = power_of_two_scale(blocks.abs().amax(-1, keepdim=True).clamp(min=floor), largest)
    scaled = (blocks / scale).clamp(-largest, largest)
    rounded = scaled.to(torch.float8_e4m3fn).float() if largest == FP8_MAX else round_to_fp4(scaled)
    out = (rounded * scale).flatten(-2)
    return (out[..., : x.shape[-1]] if pad else out).to(x.dtype)


def round_to_fp4(x: Tensor) -> Tensor:
    """Nearest e2m1 value (0 .5 1 1.5 2 3 4 6, signed) of x in [-6, 6]; ties to the even code, as IEEE rounding does."""
    magnitude = x.abs()
    # Within a binade e2m1 values are evenly spaced (0.5 below 2, 1 below 4, then 2), and torch.round ties to even.
    step = torch.where(magnitude < 2.0, 0.5, torch.where(magnitude < 4.0, 1.0, 2.0))
    return torch.copysign(torch.round(magnitude / step) * step, x)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor, block: int, largest: float, floor: float) -> Tensor:
        return _fake_quant(x, block, largest, floor)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad, None, None, None


def _round(x: Tensor, block: int, largest: float, floor: float) -> Tensor:
    apply = _StraightThrough.apply if torch.is_grad_enabled() else _fake_quant
    return apply(x, block, largest, floor)


def fake_quant_fp8(x: Tensor, block: int, floor: float = FP8_FLOOR) -> Tensor:
    """Round x [..., n] to e4m3fn, one power-of-two scale per `block` of the last dimension -> same shape and dtype."""
    return _round(x, block, FP8_MAX, floor)


def fake_quant_fp4(x: Tensor, block: int = FP4_GROUP) -> Tensor:
    """Round x [..., n] to e2m1, one power-of-two scale per `block` of the last dimension -> same shape and dtype."""
    return _round(x, block, FP4_MAX, FP4_MAX * 2.0**-126)


class _StraightThroughBf16(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.to(torch.bfloat16).to(x.dtype)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad


def fake_quant_bf16(x: Tensor) -> Tensor:
    """Round x to BF16 -> same shape and dtype. The gradient passes straight through, unrounded."""
    return _StraightThroughBf16.apply(x) if torch.is_grad_enabled() else x.to(torch.bfloat16).to(x.dtype)


def fake_quant_fp8_blocks(weight: Tensor) -> Tensor:
    """Round a weight [out, in] to e4m3fn, one power-of-two scale per 128 x 128 block -> same shape and dtype."""
    out_features, in_features = weight.shape
    pad = (0, -in_features % FP8_BLOCK, 0, -out_features % FP8_BLOCK)
    blocks = torch.nn.functional.pad(weight.float(), pad).unflatten(1, (-1, FP8_BLOCK)).unflatten(0, (-1, FP8_BLOCK))
    amax = blocks.abs().amax(dim=(1, 3), keepdim=True)
    scale = power_of_two_scale(amax.clamp_min(torch.finfo(torch.float32).tiny), FP8_MAX)
    rounded = (blocks / scale).to(torch.float8_e4m3fn).float() * scale
    return rounded.flatten(2, 3).flatten(0, 1)[:out_features, :in_features].to(weight.dtype)
