"""Linear layers without bias: with optional quantization of the input, and in fp32."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsv4.analysis.inventory import FP8_BLOCK
from dsv4.kernels import linear as products
from dsv4.kernels.linear import linear
from dsv4.kernels.quant import fake_quant_fp8


class Linear(nn.Module):
    """x [..., in] -> [..., out]. quantize: round the input to FP8 blocks of FP8_BLOCK, as the shipped FP8 GEMM does."""

    def __init__(self, in_features: int, out_features: int, quantize: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.quantize = quantize

    def forward(self, x: Tensor) -> Tensor:
        if self.quantize:
            x = fake_quant_fp8(x, FP8_BLOCK)
        return linear(x, self.weight)

    @property
    def matrix(self) -> Tensor:
        """The map's whole matrix [out, in], for kernels that take it; forward is the product with it."""
        return self.weight


def linear_fp32(x: Tensor, weight: Tensor) -> Tensor:
    """Linear map in fp32 for any storage dtype and precision: for the compressors, the router, the head."""
    return products.linear_fp32(x.float(), weight.float())
