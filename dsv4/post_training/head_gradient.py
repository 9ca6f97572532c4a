"""Gradients of hidden states and head from those of logits that are made a chunk of rows at a time and never kept."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def row_chunks(count: int, size: int) -> Iterator[slice]:
    """Consecutive slices of `count` rows, of at most `size` each."""
    return (slice(start, min(count, start + size)) for start in range(0, count, size))


class HeadGradient:
    """Gradients of hidden [n, d] and head [V, d], added up over chunks in fp32; `wanted` says which of them."""

    def __init__(self, hidden: Tensor, head: Tensor, wanted: tuple[bool, bool]) -> None:
        self._inputs = hidden, head
        self._hidden = torch.empty_like(hidden, dtype=torch.float32) if wanted[0] else None
        self._head = torch.zeros_like(head, dtype=torch.float32) if wanted[1] else None

    def add(self, rows: slice, d_logits: Tensor) -> None:
        """Take in the gradient [rows, V] of the logits of these rows."""
        hidden, head = self._inputs
        if self._hidden is not None:
            self._hidden[rows] = d_logits @ head.float()
        if self._head is not None:
            self._head.addmm_(d_logits.T, hidden[rows].float())

    def result(self) -> tuple[Tensor | None, Tensor | None]:
        """(hidden's, head's), each in its own dtype; None where not wanted."""
        pairs = zip((self._hidden, self._head), self._inputs, strict=True)
        first, second = (None if gradient is None else gradient.to(like.dtype) for gradient, like in pairs)
        return first, second
