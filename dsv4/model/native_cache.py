"""A cache as the native kernels see it."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor

from dsv4.model.cache import Cache


class NativeCache:
    """A cache's tensors as the kernels see them, with what they keep of the index keys.

    It goes with the tensors that the cache has when it is first used: write into those, put no others in their place.
    """

    def __init__(self, cache: Cache, kernels: ModuleType) -> None:
        layers: list[list[Tensor]] = []
        for layer in cache.layers:
            layers.append([layer.window])
            for state in layer.compressors():
                layers[-1] += [state.kv, state.score, state.entries]
        self.handle: Any = kernels.Cache(layers, cache.block_table)
        index_keys = [layer.index.entries for layer in cache.layers if layer.index is not None]
        # Of tensors of inference mode, as a cache that is copied in that mode has, torch does not count the writes.
        self._counted = None if any(keys.is_inference() for keys in index_keys) else index_keys
        self._written = self._writes()

    @classmethod
    def of(cls, cache: Cache, kernels: ModuleType) -> NativeCache:
        """The cache's own, made when it is first asked for."""
        if cache.native is None:
            cache.native = cls(cache, kernels)
        return cache.native

    def current(self) -> Any:
        """The kernels' object; what was kept is dropped where torch has written to the index keys since.

        A write through `.data`, or through memory that torch does not know to be a tensor's, is not seen.
        """
        written = self._writes()
        if written is None or written != self._written:
            self._written = written
            self.handle.forget()
        return self.handle

    def _writes(self) -> int | None:
        """How often torch has written to the index keys, None where it does not count."""
        return None if self._counted is None else sum(keys._version for keys in self._counted)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # a copy of the cache makes its own when it is first used
