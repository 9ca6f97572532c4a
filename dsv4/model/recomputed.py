"""Tensors that the backward computes again from others which are kept anyway, so that they need not be kept."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Size, Tensor


class Recomputed:
    """`tensor`, and `make`, which computes it again to the same bits. `make` holds detached tensors alone.

    In `unkept`, operations keep this in place of the tensor. The backward makes it once, at its first use, and lets go
    of it after the last. Of nested contexts of several tensors only the innermost has an effect.
    """

    def __init__(self, tensor: Tensor, make: Callable[[], Tensor]) -> None:
        self._place, self._numel, self._make = tensor.data_ptr(), tensor.numel(), make
        self._found: Tensor | None = None
        self._uses = 0

    def unkept(self) -> AbstractContextManager[object]:
        """Operations in this context do not keep the tensor."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Tensor | Size:
        if tensor.data_ptr() != self._place or tensor.numel() != self._numel or not tensor.is_contiguous():
            return tensor
        self._uses += 1
        return tensor.shape

    def _unpack(self, kept: Tensor | Size) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        if self._found is None:
            with torch.no_grad():
                self._found = self._make()
        found = self._found.view(kept)
        self._uses -= 1
        if self._uses <= 0:
            self._found = None
        return found


class Kept:
    """In place of a Recomputed where no gradient is recorded, or where all is kept."""

    def unkept(self) -> AbstractContextManager[object]:
        return nullcontext()


KEPT = Kept()
_all_is_kept: ContextVar[bool] = ContextVar("all_is_kept", default=False)


def recomputed(tensor: Tensor, function: Callable[..., Tensor], *inputs: Any) -> Recomputed | Kept:
    """Recomputed of tensor = function(*inputs), if a gradient is recorded and `keeping_all` has not been entered."""
    if not tensor.requires_grad or _all_is_kept.get():
        return KEPT
    kept = [value.detach() if isinstance(value, Tensor) else value for value in inputs]
    return Recomputed(tensor, lambda: function(*kept))


@contextmanager
def keeping_all() -> Generator[None]:
    """Nothing is a Recomputed here: inside activation checkpointing, whose hooks ours would hide tensors from."""
    token = _all_is_kept.set(True)
    try:
        yield
    finally:
        _all_is_kept.reset(token)
