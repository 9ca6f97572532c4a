"""Rounding of values in a conversion: refused unless requested, and measured by kind of tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt
from pathlib import Path

from torch import Tensor

from dsv4.checkpoint.errors import CheckpointError

_STRIP_ELEMENTS = 1 << 21


@dataclass
class RoundingError:
    """Difference between the values of some tensors and the values written."""

    tensors: int = 0  # number of changed tensors
    squared_values: float = 0.0
    squared_differences: float = 0.0
    worst: float = 0.0  # the largest |difference|
    worst_tensor: str = ""
    largest: float = 0.0  # the largest |value|

    @property
    def relative_rms(self) -> float:
        """Root mean square of the differences over root mean square of the values."""
        return sqrt(self.squared_differences / self.squared_values) if self.squared_values else 0.0

    def __str__(self) -> str:
        worst = f"worst {self.worst:.2e} where the largest value is {self.largest:.2e}"
        return f"relative RMS {self.relative_rms:.2e}, {worst}"


class Rounding:
    """Record of all tensors written. `errors`: by kind of tensor, of changed tensors only."""

    def __init__(self, allowed: bool) -> None:
        self.allowed = allowed
        self.errors: dict[str, RoundingError] = {}

    def compare(
        self, kind: str, place: tuple[Path, str], values: Tensor, written: Tensor, dtype: str, asked: bool = False
    ) -> None:
        """CheckpointError if `written` differs from `values`, unless rounding is allowed or `asked` for by the type.

        dtype: name of the dtype written.
        """
        error = _difference(values, written)
        if error is None:
            return
        file, name = place
        if not (self.allowed or asked):
            wanted = f"values with an exact {dtype} form (or --allow-rounding; in Python allow_rounding=True)"
            raise CheckpointError(file, wanted, f"others: {error}", name)
        total = self.errors.setdefault(kind, RoundingError())
        total.tensors += 1
        total.squared_values += error.squared_values
        total.squared_differences += error.squared_differences
        total.largest = max(total.largest, error.largest)
        if error.worst > total.worst:
            total.worst, total.worst_tensor = error.worst, name


def _difference(values: Tensor, written: Tensor) -> RoundingError | None:
    """Measured difference; None if all values are equal."""
    error, changed = RoundingError(tensors=1), False
    for before, after in zip(_strips(values), _strips(written), strict=True):
        before = before.float()
        difference = after.float().sub_(before)
        worst = float(difference.abs().max())
        changed |= worst > 0
        error.worst = max(error.worst, worst)
        error.largest = max(error.largest, float(before.abs().max()))
        error.squared_values += float(before.double().square().sum())
        error.squared_differences += float(difference.double().square().sum())
    return error if changed else None


def _strips(tensor: Tensor) -> Iterator[Tensor]:
    flat = tensor.reshape(-1)
    return (flat[start : start + _STRIP_ELEMENTS] for start in range(0, flat.numel(), _STRIP_ELEMENTS))
