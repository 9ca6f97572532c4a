"""FP8 and FP4 fake quantization on the native kernels; fp32 on the CPU. Gradients pass straight through."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv4.analysis.inventory import FP4_GROUP
from dsv4.kernels import backends, cpu
from dsv4.kernels.quant.reference import FP8_FLOOR
from dsv4.kernels.rows import copied_rows


def fake_quant_fp8(x: Tensor, block: int, floor: float = FP8_FLOOR) -> Tensor:
    """Round x [..., n] to e4m3fn."""
    return _fake_quant(x, block, False, floor)


def fake_quant_fp4(x: Tensor, block: int = FP4_GROUP) -> Tensor:
    """Round x [..., n] to e2m1."""
    return _fake_quant(x, block, True, 0.0)


def _fake_quant(x: Tensor, block: int, fp4: bool, floor: float) -> Tensor:
    return _StraightThrough.apply(x, block, fp4, floor) if backends.records(x) else _rounded(x, block, fp4, floor)


def _rounded(x: Tensor, block: int, fp4: bool, floor: float) -> Tensor:
    rows = copied_rows(x)
    cpu.kernels().fake_quant(rows, block, fp4, floor)
    return rows.view(x.shape)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, block: int, fp4: bool, floor: float) -> Tensor:
        return _rounded(x, block, fp4, floor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad, None, None, None
