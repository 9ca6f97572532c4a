"""Autocast and the operations: products of a layer's weights follow it, what must be fp32 is computed without it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

Rest = ParamSpec("Rest")
Output = TypeVar("Output")


def product_dtype(x: Tensor) -> torch.dtype | None:
    """Number format that autocast gives products with `x`; None outside autocast."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def without_autocast(
    operation: Callable[Concatenate[Tensor, Rest], Output],
) -> Callable[Concatenate[Tensor, Rest], Output]:
    """Decorate an operation whose products stay in the number format of their operands under autocast.

    Autocast would round them to bfloat16 in spite of every `.float()` in the operation.
    """

    @wraps(operation)
    def run(x: Tensor, *args: Rest.args, **kwargs: Rest.kwargs) -> Output:
        if product_dtype(x) is None:
            return operation(x, *args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):
            return operation(x, *args, **kwargs)

    return run
