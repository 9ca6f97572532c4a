"""The cache of a model: fixed state per sequence, and pages of compressed entries, which sequences take and share.

`tensors.py` has the tensors, `pages.py` the allocator, `state.py` snapshots of a sequence's state, `cache.py` the cache
made of them, `native.py` its view for the native kernels.
"""

from dsv4.cache.cache import Cache
from dsv4.cache.pages import OutOfPagesError
from dsv4.cache.state import Snapshot
from dsv4.cache.tensors import CompressorState, LayerCache

__all__ = ["Cache", "CompressorState", "LayerCache", "OutOfPagesError", "Snapshot"]
