"""FP8 and FP4 fake quantization on the native kernels; fp32 on the CPU."""

from __future__ import annotations

from torch import Tensor

from dsv4.analysis.inventory import FP4_GROUP
from dsv4.kernels import cpu
from dsv4.kernels.rows import copied_rows


def fake_quant_fp8(x: Tensor, block: int) -> Tensor:
    """Round x [..., n] to e4m3fn."""
    return _fake_quant(x, block, fp4=False)


def fake_quant_fp4(x: Tensor, block: int = FP4_GROUP) -> Tensor:
    """Round x [..., n] to e2m1."""
    return _fake_quant(x, block, fp4=True)


def _fake_quant(x: Tensor, block: int, fp4: bool) -> Tensor:
    rows = copied_rows(x)
    cpu.kernels().fake_quant(rows, block, fp4)
    return rows.view(x.shape)
