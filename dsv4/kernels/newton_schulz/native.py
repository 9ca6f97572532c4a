"""Newton-Schulz iterations on the native kernels; BF16 on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.kernels import cpu


def iterate(x: Tensor, steps: tuple[tuple[float, float, float], ...]) -> Tensor:
    """The matrices x [N, n, m], n <= m, after the steps."""
    out = x.detach().clone(memory_format=torch.contiguous_format)
    cpu.kernels().newton_schulz(out.view(torch.int16), [number for step in steps for number in step])
    return out
