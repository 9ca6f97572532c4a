"""Quantization-aware training: the forward uses the weights' stored values, the update goes to the fp32 masters.

A straight-through estimator outside the model: for one forward and backward the parameters hold their stored values
(FP4 routed experts, FP8 projections, BF16 embedding, head and norms); then the masters return and receive the gradients
unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dsv4.kernels.quant import fake_quant_fp4, fake_quant_fp8_blocks
from dsv4.model.parameters import stored_dtype

_ROUNDED = ("I8", "F8_E4M3", "BF16")
_MATRICES_AT_ONCE = 64


def as_stored(name: str, weight: Tensor) -> Tensor:
    """Round-trip of the parameter `name` through the official layout: the values read back after saving."""
    dtype = stored_dtype(name)
    if dtype == "I8":  # FP4; blocks do not cross rows
        return torch.cat([fake_quant_fp4(matrices) for matrices in weight.split(_MATRICES_AT_ONCE)])
    if dtype == "F8_E4M3":
        return fake_quant_fp8_blocks(weight)
    return weight.bfloat16().to(weight.dtype) if dtype == "BF16" else weight


@contextmanager
def stored_weights(model: nn.Module) -> Iterator[None]:
    """Context in which the model's parameters hold their stored values; on exit the masters return, bit for bit."""
    masters = [(name, p, p.data) for name, p in model.named_parameters() if stored_dtype(name) in _ROUNDED]
    try:
        with torch.no_grad():
            for name, parameter, master in masters:
                parameter.data = as_stored(name, master)
        yield
    finally:
        for _, parameter, master in masters:
            parameter.data = master
