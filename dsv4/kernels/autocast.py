"""Autocast rules of the operations: products with a layer's weights follow it, operations in fp32 run without it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

Inputs = ParamSpec("Inputs")
Output = TypeVar("Output")


def product_dtype(x: Tensor) -> torch.dtype | None:
    """Dtype that autocast gives products with `x`; None outside autocast."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def without_autocast(operation: Callable[Inputs, Output]) -> Callable[Inputs, Output]:
    """Decorate an operation so that its products keep their operands' dtype under autocast.

    Autocast would round them to bfloat16 in spite of every `.float()` in the operation.
    """

    @wraps(operation)
    def run(*args: Inputs.args, **kwargs: Inputs.kwargs) -> Output:
        x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        if product_dtype(x) is None:
            return operation(*args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):
            return operation(*args, **kwargs)

    return run
