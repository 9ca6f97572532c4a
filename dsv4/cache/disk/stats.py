"""Counters of a disk cache, with vLLM's names where it has one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class DiskCacheStats:
    """Counters since the start of the process; each is written by one thread and may be read by any."""

    external_prefix_cache_queries: int = 0  # tokens that were looked for
    external_prefix_cache_hits: int = 0  # tokens that a request went on from
    kv_offload_load_bytes: int = 0  # read from files
    kv_offload_store_bytes: int = 0  # written to files
    num_hits: int = 0  # requests that began at a prefix from the disk
    num_misses: int = 0  # requests that were looked up and did not
    num_writes: int = 0  # files written
    num_dropped_writes: int = 0  # left out: no room, a full queue, a lock of another process, a block before them gone
    num_evicted_files: int = 0
    num_damaged_files: int = 0  # files and indexes that were not what they should be
