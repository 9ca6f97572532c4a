"""Matrix product with a weight, each row of the result a function of that row of the input alone.

Contract: x [..., in], weight [out, in] of the same dtype, or as stored (kernels/stored.py) -> [..., out].
Native, without gradient, fp32 on the CPU: each element is one chain of fused multiply-adds over the inputs in ascending
order, so the row independence is to the bit. Reference: on x86 it rests on MKL's strict mode, which `dsv4` asks for
before torch starts where MKL has it (see dsv4/__init__.py).
"""

import torch
from torch import Tensor

from dsv4.kernels import native
from dsv4.kernels.linear import reference
from dsv4.kernels.stored import weight_argument


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in] @ weight [out, in]^T -> [..., out]."""
    kernels = native.module()
    trained = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if kernels is None or trained or x.device.type != "cpu" or not x.dtype == weight.dtype == torch.float32:
        return reference.linear(x, weight)
    rows = x.detach().reshape(-1, x.shape[-1]).contiguous()
    out = rows.new_empty(rows.shape[0], weight.shape[0])
    kernels.linear(rows, weight_argument(weight), out)
    return out.view(*x.shape[:-1], weight.shape[0])


__all__ = ["linear"]
