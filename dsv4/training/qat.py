"""Quantization-aware training: forward with the weights as they will be stored, train the fp32 masters behind them.

The straight-through estimator without touching the model: for one forward and backward the parameters hold their
stored values (FP4 routed experts, FP8 projections), then the masters return and receive the gradients as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dsv4.kernels.quant import fake_quant_fp4

FP8_MAX = 448.0
FP8_BLOCK = 128
_FP8_NAMES = re.compile(
    r"(attn\.(wq_a|wq_b|wkv|wo_a|wo_b)|indexer\.wq_b|shared_experts\.w[123]|(^|\.)mtp\.\d+\.(e_proj|h_proj))\.weight$"
)


def stored_format(name: str) -> str:
    """Number format of the weight `name` in the official instruct layout: "fp4", "fp8" or "plain"."""
    if re.search(r"(^|\.)experts\.\d+\.w[123]\.weight$", name):
        return "fp4"
    return "fp8" if _FP8_NAMES.search(name) else "plain"


def fake_quant_fp8_blocks(weight: Tensor) -> Tensor:
    """Round a weight [out, in] to e4m3 with one power-of-two scale a 128 x 128 block; cut blocks at the edges."""
    out_features, in_features = weight.shape
    pad = (0, -in_features % FP8_BLOCK, 0, -out_features % FP8_BLOCK)
    blocks = nn.functional.pad(weight.float(), pad).unflatten(1, (-1, FP8_BLOCK)).unflatten(0, (-1, FP8_BLOCK))
    amax = blocks.abs().amax(dim=(1, 3), keepdim=True)
    mantissa, exponent = torch.frexp(amax.clamp_min(torch.finfo(torch.float32).tiny) * (1.0 / FP8_MAX))
    scale = torch.ldexp(torch.ones_like(amax), exponent - (mantissa == 0.5).int())
    rounded = (blocks / scale).to(torch.float8_e4m3fn).float() * scale
    return rounded.flatten(2, 3).flatten(0, 1)[:out_features, :in_features].to(weight.dtype)


def as_stored(name: str, weight: Tensor) -> Tensor:
    """The value that reading back a stored `weight` gives."""
    kind = stored_format(name)
    if kind == "fp4":
        return fake_quant_fp4(weight)
    return fake_quant_fp8_blocks(weight) if kind == "fp8" else weight


@contextmanager
def stored_weights(model: nn.Module) -> Iterator[None]:
    """Inside, the model's parameters hold their stored values; outside, their masters again, bit for bit."""
    masters = [(p, p.data) for name, p in model.named_parameters() if stored_format(name) != "plain"]
    try:
        with torch.no_grad():
            _swap_in_experts(model)
            for name, parameter in model.named_parameters():
                if stored_format(name) == "fp8":
                    parameter.data = fake_quant_fp8_blocks(parameter.data)
        yield
    finally:
        for parameter, master in masters:
            parameter.data = master


def _swap_in_experts(model: nn.Module, stack: int = 64) -> None:
    """FP4 for the routed experts, many matrices of one width at a time: their blocks lie inside rows."""
    by_shape: dict[torch.Size, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if stored_format(name) == "fp4":
            by_shape.setdefault(parameter.shape, []).append(parameter)
    for parameters in by_shape.values():
        for start in range(0, len(parameters), stack):
            chunk = parameters[start : start + stack]
            for parameter, rounded in zip(chunk, fake_quant_fp4(torch.stack([p.data for p in chunk])), strict=True):
                parameter.data = rounded
