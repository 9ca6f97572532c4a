"""A cache as the native kernels see it: its tensors, and the index keys that they keep quantized beside the entries.

Kept keys belong to pages. The kernels know what they write themselves; of every other write the cache tells them the
pages. Nothing watches the tensors: whoever writes to entries from outside calls `Cache.changed`, and under DSV4_CHECK=1
forgetting that is an error.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType
from typing import Any

import numpy as np

from dsv4 import checks
from dsv4.cache.tensors import LayerCache


class StaleCacheError(RuntimeError):
    """Tensors of a cache were changed without `Cache.changed`, or others put in their place."""


class NativeCache:
    """The kernels' object of a cache, for the tensors that it has now; a copy of a cache makes its own.

    block_table int64 [slots, pages per slot], stored int64 [slots] and the tensors are read where they lie.
    """

    def __init__(
        self,
        kernels: ModuleType,
        layers: list[LayerCache],
        block_table: np.ndarray,
        stored: np.ndarray,
        num_pages: int,
    ) -> None:
        self._checked = checks.enabled()
        self._places = _places(layers)  # not the layers: they name this object, and a cycle would outlive its cache
        index = next(
            (layer.index.format.native for layer in layers if layer.index is not None), layers[0].format.native
        )
        tensors = [layer.native_tensors() for layer in layers]
        self.handle: Any = kernels.Cache(
            tensors, layers[0].format.native, index, block_table, stored, num_pages, self._checked
        )
        for layer in layers:
            if layer.index is not None:
                layer.index.watcher = self

    def check(self, layers: list[LayerCache]) -> None:
        """StaleCacheError where the kernels would compute with former tensors or entries; only under DSV4_CHECK=1."""
        if not self._checked:
            return
        if _places(layers) != self._places:
            raise StaleCacheError("another tensor lies in the place of one of the cache's: write into those it has")
        layer, page = self.handle.stale()
        if layer >= 0:
            raise StaleCacheError(
                f"index keys of layer {layer}, page {page}, were written from outside: call Cache.changed(slot) after"
            )

    def forget(self, pages: Iterable[int]) -> None:
        """Drop what is kept of pages whose entries someone else has written."""
        for page in pages:
            self.handle.forget(page)

    @property
    def quantized_rows(self) -> int:
        """Index keys that were quantized since the object was made, over all layers."""
        return self.handle.quantized_rows()

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # the copy makes its own when it is first used


def _places(layers: list[LayerCache]) -> list[int]:
    return [tensor.data_ptr() for layer in layers for tensor in layer.tensors()]
