"""Newton-Schulz iterations on the native kernels; fp32 and BF16 on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.kernels import cpu


def iterate(x: Tensor, steps: tuple[tuple[float, float, float], ...]) -> Tensor:
    """The matrices x [N, n, m], n <= m, after the steps."""
    out = x.detach().clone(memory_format=torch.contiguous_format)
    numbers = out.view(torch.int16) if out.dtype == torch.bfloat16 else out
    cpu.kernels().newton_schulz(numbers, [number for step in steps for number in step])
    return out
