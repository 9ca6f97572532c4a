"""Routed experts from mapped files within a budget of bytes: for models larger than memory."""

from __future__ import annotations

import mmap
import os
import sys
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from torch import Tensor

from dsv4.checkpoint.mapped import MappedFiles, MappedRange, mapped_files
from dsv4.kernels import backends
from dsv4.kernels.stored import StoredTensor, matrices_of
from dsv4.model.backend import EXPERT_MEMORY
from dsv4.model.moe import MoE
from dsv4.model.stacks import has_stored_experts
from dsv4.model.transformer import Transformer

PAGE_BYTES = mmap.PAGESIZE


class ExpertMemoryError(ValueError):
    """A model whose experts' memory cannot be limited, or a budget that is too small for it."""


class ExpertStats(NamedTuple):
    """Counts since the budget was set. A layer's experts count once per batch of up to 1,024 tokens."""

    hits: int  # experts that were in memory, or being read ahead, when a layer needed them
    misses: int  # experts that were read because a layer needed them
    read_ahead_hits: int  # those hits that were read ahead: experts of hash layers, known from the token ids
    bytes_read: int  # of all reads, in whole pages
    evictions: int  # experts dropped to make room
    resident_bytes: int  # now, experts being read included
    peak_bytes: int  # most of them at any time: never more than the budget


class ExpertMemory:
    """Budget of a loaded model's routed experts: `limit_experts` makes it, the native kernels keep it.

    Counted are whole pages of the mapped files. Experts that are least recently used are dropped from the process and
    from the system's page cache, which another process that has mapped them, or data not yet written to the disk, can
    prevent. Weights other than routed experts are not limited.

    `rows`: int64 [n, 6], pages of (layer, expert, address, bytes, index of the file, place in the file).
    """

    def __init__(self, model: Transformer, files: MappedFiles, budget: int) -> None:
        """ExpertMemoryError if the budget is smaller than the experts of one token in one layer."""
        config = model.config
        self.budget = budget
        experts = list(_experts(model))
        descriptors = files.open_again()
        try:
            places = [(layer, expert, _byte_ranges(parts)) for layer, expert, parts in experts]
            self.rows = rows = np.array(list(_page_rows(places, files.ranges, list(descriptors))), dtype=np.int64)
            sizes = np.zeros((len(config.compress_ratios), config.n_routed_experts), dtype=np.int64)
            np.add.at(sizes, (rows[:, 0], rows[:, 1]), rows[:, 3])
            self.total_bytes, self.num_experts = int(sizes.sum()), sizes.size
            self.least = int(np.sort(sizes, axis=1)[:, -config.num_experts_per_tok :].sum(axis=1).max())
            if budget < self.least:
                raise ExpertMemoryError(
                    f"expert_memory is {budget} bytes; allowed: {self.least} or more, which the"
                    f" {config.num_experts_per_tok} experts of one token in one layer take"
                )
            kernels: Any = backends.native_module()
            owner = [parts for _, _, parts in experts]
            self.residency: Any = kernels.ExpertResidency(budget, *sizes.shape, rows, list(descriptors.values()), owner)
        finally:
            for descriptor in descriptors.values():
                os.close(descriptor)

    def stats(self) -> ExpertStats:
        return ExpertStats(**self.residency.counts())

    def describe(self) -> str:
        """One line for a log: sizes of experts and budget."""
        share = min(1.0, self.budget / self.total_bytes)
        return (
            f"{self.num_experts} routed experts, {self.total_bytes / 1e9:.2f} GB, stay in their files;"
            f" {self.budget / 1e9:.2f} GB ({share:.0%}) of them are kept in memory, the others read when needed"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None  # the copy's experts lie in its own memory

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def limit_experts(model: Transformer, budget: int) -> ExpertMemory:
    """Keep at most `budget` bytes of a loaded model's routed experts in memory. Same bits, read from disk as needed.

    ExpertMemoryError if the native kernels do not run the frozen model, if its experts are not views of mapped files,
    if the system is not Linux, or for a budget that is too small.
    """
    files = mapped_files(model)
    obstacle = None
    if sys.platform != "linux":
        obstacle = f"the system is {sys.platform}, and only Linux drops and reads parts of a mapped file on demand"
    elif model.backend.name != "native":
        obstacle = f"the model does not run on the native kernels ({backends.describe()})"
    elif files is None or not has_stored_experts(model):
        obstacle = "the routed experts are float copies in memory, not FP4, FP8 or BF16 matrices in mapped files"
    if obstacle is not None or files is None:
        raise ExpertMemoryError(f"expert_memory is {budget}, but {obstacle}; allowed: None")
    if hasattr(model, EXPERT_MEMORY):  # its residency ends before another one takes its pages
        delattr(model, EXPERT_MEMORY)
        model.refresh()
    memory = ExpertMemory(model, files, budget)
    setattr(model, EXPERT_MEMORY, memory)
    model.refresh()
    return memory


def _experts(model: Transformer) -> Iterator[tuple[int, int, list[Tensor]]]:
    """(layer, expert, its tensors: codes and scales of w1, w2 and w3) of each routed expert; MTP blocks come last."""
    for layer, block in enumerate((*model.layers, *model.mtp)):
        experts = cast(MoE, block.ffn).experts
        for expert, matrices in enumerate(zip(*map(matrices_of, (experts.w1, experts.w2, experts.w3)), strict=True)):
            stored = [cast(StoredTensor, matrix) for matrix in matrices]
            tensors = [part for matrix in stored for part in (matrix.codes, matrix.scales)]
            yield layer, expert, [part for part in tensors if part is not None]


def _byte_ranges(tensors: list[Tensor]) -> list[tuple[int, int]]:
    """(first address, address after the last) of contiguous tensors, joined where one follows another."""
    joined: list[tuple[int, int]] = []
    for first, last in sorted((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors):
        if joined and joined[-1][1] == first:
            first = joined.pop()[0]
        joined.append((first, last))
    return joined


def _page_rows(
    experts: list[tuple[int, int, list[tuple[int, int]]]], mapped: list[MappedRange], files: list[Path]
) -> Iterator[tuple[int, int, int, int, int, int]]:
    """Rows of (layer, expert, address, bytes, index in `files`, place in the file), whole pages of each byte range."""
    mapped = sorted(mapped)
    starts = [span.first for span in mapped]
    for layer, expert, ranges in experts:
        for first, last in ranges:
            span = mapped[max(0, bisect_right(starts, first) - 1)]
            if not span.first <= first < last <= span.last:
                raise ExpertMemoryError(f"expert {expert} of layer {layer} does not lie in a mapped file")
            page = first - first % PAGE_BYTES
            size = -(-(last - page) // PAGE_BYTES) * PAGE_BYTES
            yield layer, expert, page, size, files.index(span.file), page - span.first + span.offset
