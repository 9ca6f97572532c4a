"""LoRA (arXiv 2106.09685): a frozen matrix W and a trained product of two thin ones, y = x W^T + scale * x A^T B^T.

A is [rank, in] and B [out, rank], zero at first, which leaves the model as it is; experts have a pair each. The side
products need no gradient of W, which may stay as it is stored, and run on the same kernels as W. Where a kernel takes
the whole matrix (head, compressors), it gets W + scale * B A.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dsv4.analysis.inventory import FP8_BLOCK
from dsv4.kernels.grouped_linear import grouped_linear
from dsv4.kernels.linear import linear
from dsv4.kernels.quant import fake_quant_fp8
from dsv4.kernels.stored import widened
from dsv4.model.linear import Linear
from dsv4.model.moe import Experts

_ADAPTER = re.compile(r"\.lora_[AB](\.w[123])?$")


def is_adapter(name: str) -> bool:
    """True for the name of an adapter's parameter."""
    return _ADAPTER.search(name) is not None


def _pair(weight: Tensor, rank: int, generator: torch.Generator) -> tuple[nn.Parameter, nn.Parameter]:
    """(A, B) for a matrix [out, in] or a stack [E, out, in]: A uniform within 1 / sqrt(in), as in PEFT, and B zero."""
    *experts, out, width = weight.shape
    bound = 1.0 / math.sqrt(width)
    a = torch.empty(*experts, rank, width).uniform_(-bound, bound, generator=generator)
    return nn.Parameter(a.to(weight.device)), nn.Parameter(torch.zeros(*experts, out, rank, device=weight.device))


class LoraLinear(Linear):
    """A Linear with an adapter; it takes over the weight of `base`."""

    def __init__(self, base: Linear, rank: int, scale: float, generator: torch.Generator) -> None:
        nn.Module.__init__(self)
        self.weight, self.quantize, self.scale = base.weight, base.quantize, scale
        self.lora_A, self.lora_B = _pair(base.weight, rank, generator)

    def forward(self, x: Tensor) -> Tensor:
        if self.quantize:
            x = fake_quant_fp8(x, FP8_BLOCK)
        return linear(x, self.weight) + linear(linear(x, self.lora_A), self.lora_B) * self.scale

    @property
    def matrix(self) -> Tensor:
        return torch.addmm(widened(self.weight), self.lora_B, self.lora_A, alpha=self.scale)


class LoraExperts(Experts):
    """Routed experts with adapters on the stacks `names` (of w1, w2, w3); it takes over the weights of `base`."""

    def __init__(
        self, base: Experts, names: Iterable[str], rank: int, scale: float, generator: torch.Generator
    ) -> None:
        nn.Module.__init__(self)
        self.w1, self.w2, self.w3 = base.w1, base.w2, base.w3
        self.limit, self.quantize, self.scale = base.limit, base.quantize, scale
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        for name in names:
            self.lora_A[name], self.lora_B[name] = _pair(getattr(base, name), rank, generator)

    def product(self, name: str, x: Tensor, sizes: list[int]) -> Tensor:
        out = super().product(name, x, sizes)
        if name not in self.lora_A:
            return out
        side = grouped_linear(grouped_linear(x, sizes, self.lora_A[name]), sizes, self.lora_B[name])
        return out + side * self.scale
