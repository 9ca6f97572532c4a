"""Names of the number formats that a run's products multiply: kernels/precision.py."""

from typing import Literal

Precision = Literal["fp32", "bf16", "fp8"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp8")
