"""Prefixes on disk, shared by processes and kept over restarts: compressed entries of whole blocks, and states.

`keys.py` names prefixes by hashes, `records.py` has the files and their checksums, `index.py` the SQLite index of what
lies where, `folder.py` the folder of both under one lock, `writer.py` the thread that writes, `packing.py` pages as
bytes, `disk_cache.py` what the engine calls, `reading.py` loads in threads.

Damage of any kind is a miss: a payload counts only if its checksum names the very prefix that is looked for.
"""

from dsv4.cache.disk.disk_cache import DiskCache, DiskLookup, DiskMatch, LoadedPrefix
from dsv4.cache.disk.keys import PrefixKeys, root_key
from dsv4.cache.disk.reading import Reader, Reading
from dsv4.cache.disk.stats import DiskCacheStats

__all__ = [
    "DiskCache",
    "DiskCacheStats",
    "DiskLookup",
    "DiskMatch",
    "LoadedPrefix",
    "PrefixKeys",
    "Reader",
    "Reading",
    "root_key",
]
