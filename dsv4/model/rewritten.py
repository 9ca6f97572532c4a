"""Streams between a block's sub-layers: the backward writes them again instead of keeping them from the forward."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Size, Tensor

from dsv4.kernels.mhc import hc_post


class RewrittenStreams:
    """`streams` = hc_post(y, before, post, comb), to the same bits, from what that write keeps for its own gradients.

    In `unkept`, operations keep this in place of the streams. The backward computes them once, at their first use, and
    lets go of them after the last.
    """

    def __init__(self, streams: Tensor, y: Tensor, before: Tensor, post: Tensor, comb: Tensor) -> None:
        self._place, self._numel = streams.data_ptr(), streams.numel()
        self._inputs = tuple(tensor.detach() for tensor in (y, before, post, comb))
        self._found: Tensor | None = None
        self._uses = 0

    def unkept(self) -> AbstractContextManager[object]:
        """Operations in this context do not keep the streams."""
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
                self._found = hc_post(*self._inputs)
        found = self._found.view(kept)
        self._uses -= 1
        if self._uses <= 0:
            self._found = None
        return found
