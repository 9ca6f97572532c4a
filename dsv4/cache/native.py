"""A cache as the native kernels see it: its tensors, and the index keys that they keep quantized beside the entries.

Kept keys belong to pages. The kernels know what they write themselves; of every other write the cache tells them the
pages. Nothing watches the tensors: whoever writes to entries from outside calls `Cache.changed`, and under DSV4_CHECK=1
forgetting that is an error.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dsv4 import checks

if TYPE_CHECKING:
    from dsv4.cache.cache import Cache


class StaleCacheError(RuntimeError):
    """Tensors of a cache were changed without `Cache.changed`, or others put in their place."""


class NativeCache:
    """The kernels' object of a cache, made on first use and kept in it. A copy of a cache makes its own."""

    def __init__(self, cache: Cache, kernels: ModuleType) -> None:
        layers = [layer.tensors() for layer in cache.layers]
        self._checked = checks.enabled()
        self._places = _places(layers)
        self.handle: Any = kernels.Cache(layers, cache.block_table, cache.num_pages, self._checked)

    @classmethod
    def of(cls, cache: Cache, kernels: ModuleType) -> NativeCache:
        """The cache's own. StaleCacheError, under DSV4_CHECK=1, where it would give results of former entries."""
        native = cache.native
        if native is None:
            native = cache.native = cls(cache, kernels)
            for layer in cache.layers:
                if layer.index is not None:
                    layer.index.watcher = native
        elif native._checked:
            native._check(cache)
        return native

    def forget(self, pages: Iterable[int]) -> None:
        """Drop what is kept of pages whose entries someone else has written."""
        for page in pages:
            self.handle.forget(page)

    @property
    def quantized_rows(self) -> int:
        """Index keys that were quantized since the object was made, over all layers."""
        return self.handle.quantized_rows()

    def _check(self, cache: Cache) -> None:
        if _places([layer.tensors() for layer in cache.layers]) != self._places:
            raise StaleCacheError("another tensor lies in the place of one of the cache's: write into those it has")
        layer, page = self.handle.stale()
        if layer >= 0:
            raise StaleCacheError(
                f"index keys of layer {layer}, page {page}, were written from outside: call Cache.changed(slot) after"
            )

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # a copy of the cache makes its own when it is first used


def _places(layers: list[list[Tensor]]) -> list[int]:
    return [tensor.data_ptr() for tensors in layers for tensor in tensors]
