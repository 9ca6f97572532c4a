"""The cache of a model: fixed state per sequence, and pages of compressed entries, which sequences take and share.

`tensors.py` has the tensors, `pages.py` the allocator, `state.py` snapshots of a sequence's state, `cache.py` the cache
made of them, `native.py` its view for the native kernels, `prefix.py` the prefixes that later sequences go on from,
`rollback.py` what it takes to take the last tokens of a sequence back, `mtp.py` what the MTP block has yet to read.
"""

from dsv4.cache.cache import Cache
from dsv4.cache.pages import OutOfPagesError
from dsv4.cache.prefix import NO_MATCH, PrefixCache, PrefixEntry, PrefixMatch
from dsv4.cache.rollback import RowLog
from dsv4.cache.state import SavedRow, Snapshot
from dsv4.cache.tensors import CompressorState, LayerCache

__all__ = [
    "NO_MATCH",
    "Cache",
    "CompressorState",
    "LayerCache",
    "OutOfPagesError",
    "PrefixCache",
    "PrefixEntry",
    "PrefixMatch",
    "RowLog",
    "SavedRow",
    "Snapshot",
]
