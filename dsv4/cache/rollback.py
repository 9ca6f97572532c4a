"""Rows of a sequence's state as they lay before a forward, so that its last tokens can be taken back to the bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dsv4.cache.tensors import LayerCache


class RowLog:
    """Copies of ring rows that a forward is about to overwrite, one record per slot.

    A ring [slots, size, ...] holds position p in row p % size, so that a token overwrites the one `size` before it.
    """

    def __init__(self, layers: Sequence[LayerCache]) -> None:
        self._rings = [_view(ring) for layer in layers for ring in layer.rings()]
        self._kept: dict[int, tuple[int, int, list[Any]]] = {}  # slot -> first position, count, copies of each ring
        self.most = min(
            (ring.shape[1] for ring in self._rings), default=0
        )  # tokens that one forward can write and take back

    def keep(self, slot: int, first: int, count: int) -> None:
        """Copy the rows of positions first to first + count - 1."""
        copies = [
            _copy(ring[slot, rows]) for ring in self._rings for _, rows in ring_spans(first, count, ring.shape[1])
        ]
        self._kept[slot] = first, count, copies

    def put_back(self, slot: int, length: int, end: int) -> None:
        """Undo what was written for positions length to end - 1. ValueError where that is not what was kept."""
        first, count, copies = self._kept.pop(slot, (end, 0, []))
        if not first <= length <= end == first + count:
            raise ValueError(
                f"cache row {slot} holds {end} tokens and can go back to {first} at the earliest, not to {length}"
            )
        each = iter(copies)
        for ring in self._rings:
            for offset, rows in ring_spans(first, count, ring.shape[1]):
                kept, skip = next(each), max(0, length - first - offset)
                if skip < len(kept):
                    ring[slot, rows.start + skip : rows.stop] = kept[skip:]

    def forget(self, slot: int) -> None:
        """Drop what was kept of a slot."""
        self._kept.pop(slot, None)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # views of another cache's memory: the copy makes its own when it is first used


def ring_spans(first: int, count: int, size: int) -> Iterator[tuple[int, slice]]:
    """(offset from the first position, ring rows) of the one or two runs of rows that the positions lie in."""
    row = first % size
    fit = min(count, size - row)
    yield 0, slice(row, row + fit)
    if fit < count:
        yield fit, slice(0, count - fit)


def _view(ring: Tensor) -> Any:
    """The ring as bytes in NumPy, whose slices take a tenth of torch's time; off the CPU the tensor itself."""
    return ring.view(torch.uint8).numpy() if ring.is_cpu else ring


def _copy(rows: Any) -> Any:
    return rows.clone() if isinstance(rows, Tensor) else rows.copy()
