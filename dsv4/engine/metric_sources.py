"""Metrics of what lies beside the cache's rows: prefixes on disk, and the experts."""

from __future__ import annotations

from collections.abc import Iterator

from dsv4.cache.disk import DiskCacheStats
from dsv4.checkpoint.expert_memory import ExpertMemory
from dsv4.engine.metrics import Metric, counter, gauge
from dsv4.model.moe import expert_loads
from dsv4.model.transformer import Transformer


class DiskCacheMetrics:
    """Numbers of a disk cache since the start of the process."""

    def __init__(self, stats: DiskCacheStats) -> None:
        self.stats = stats

    def metrics(self) -> Iterator[Metric]:
        stats, name = self.stats, "vllm:external_prefix_cache"
        yield counter(f"{name}_queries", "Tokens looked up on disk.", stats.external_prefix_cache_queries)
        yield counter(f"{name}_hits", "Tokens taken from the disk.", stats.external_prefix_cache_hits)
        yield counter("dsv4:disk_cache_load_bytes", "Bytes read from the disk cache.", stats.kv_offload_load_bytes)
        yield counter("dsv4:disk_cache_store_bytes", "Bytes written to the disk cache.", stats.kv_offload_store_bytes)
        yield counter(
            "dsv4:disk_cache_dropped_writes",
            "Writes that were left out, for lack of time or of space.",
            stats.num_dropped_writes,
        )
        yield counter("dsv4:disk_cache_evicted_files", "Files deleted to make room.", stats.num_evicted_files)
        yield counter("dsv4:disk_cache_damaged_files", "Files that could not be used.", stats.num_damaged_files)


class ExpertMemoryMetrics:
    """Numbers of routed experts that are read from disk within a budget."""

    def __init__(self, memory: ExpertMemory) -> None:
        self.memory = memory

    def metrics(self) -> Iterator[Metric]:
        stats, name = self.memory.stats(), "dsv4:expert_memory"
        yield counter(f"{name}_hits", "Experts that were in memory when a layer needed them.", stats.hits)
        yield counter(f"{name}_read_ahead_hits", "Those of them that were read ahead.", stats.read_ahead_hits)
        yield counter(f"{name}_misses", "Experts that were read because a layer needed them.", stats.misses)
        yield counter(f"{name}_evictions", "Experts dropped to make room.", stats.evictions)
        yield counter(f"{name}_read_bytes", "Bytes of experts read from the disk.", stats.bytes_read)
        yield gauge(f"{name}_bytes", "Bytes of routed experts in memory.", stats.resident_bytes)
        yield gauge(f"{name}_peak_bytes", "Most bytes of routed experts in memory.", stats.peak_bytes)


class ExpertLoadMetrics:
    """Tokens of each routed expert of a model; engines of the same model count together."""

    def __init__(self, model: Transformer) -> None:
        self._loads = expert_loads(model)
        main = len(model.layers)
        self._names = [str(i) if i < main else f"mtp.{i - main}" for i in range(len(self._loads))]

    def metrics(self) -> Iterator[Metric]:
        samples = [
            ((("layer", name), ("expert", str(expert))), float(tokens))
            for name, load in zip(self._names, self._loads, strict=True)
            for expert, tokens in enumerate(load.tolist())
        ]
        yield Metric("dsv4:expert_tokens", "counter", "Tokens of each routed expert, by layer.", samples)
