"""The cache of one model: rows of sequences, each with a fixed state and the pages that its tokens need.

A page covers PAGE_TOKENS tokens of a sequence in every layer. Rows take pages from one pool as their tokens come, in
any order. Two rows, or a row and someone outside, may hold the same page: it is copied before a row writes to it.

Pages are never wiped. That is safe by one rule: of a sequence with n entries only those, 0 to n - 1, are read, and
kernels that take entries in chunks read the blank row of zeros in every place past them. What a page held before, a
former sequence's NaN too, so reaches nobody, and `reset` does nothing to a page that another row holds. The fixed state
is wiped at `reset`: a snapshot depends on its own sequence alone.

On the CPU the system hands memory out as it is written, so that the tensors have all pages from the start. Elsewhere
they grow, at least twofold, when the pages in use do not fit; page numbers stay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from dsv4.cache.formats import CacheDtype
from dsv4.cache.mtp import MTPState
from dsv4.cache.native import NativeCache
from dsv4.cache.pages import BlockTable, OutOfPagesError, PagePool, pages_for
from dsv4.cache.rollback import RowLog
from dsv4.cache.state import SavedRow, Snapshot, check_same_kind, clone, layer_views
from dsv4.cache.tensors import CompressorState, LayerCache, new_layer, num_bytes
from dsv4.config import COMPRESSION_KINDS, PAGE_TOKENS, ModelConfig

GROWTH_PAGES = 64  # that growing tensors get at a time, at least


class Cache:
    """State of `batch_size` sequences of up to `max_tokens` tokens each, and pages for them.

    `dtype`: of keys and entries, or "shipped": as the published model stores them (formats.py), for shipped numerics.
    `max_pages`: pages of all rows together; by default as many as full rows need. `grows`: the tensors get memory for
    pages as they are used; by default where the device is not the CPU. ValueError unless the numbers are at least 1.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_tokens: int,
        device: torch.device,
        dtype: CacheDtype,
        max_pages: int | None = None,
        grows: bool | None = None,
    ) -> None:
        if batch_size < 1 or max_tokens < 1 or (max_pages is not None and max_pages < 1):
            pages = "" if max_pages is None else f", max_pages {max_pages}"
            raise ValueError(f"new_cache: batch_size {batch_size}, max_tokens {max_tokens}{pages} must be at least 1")
        self.config, self.batch_size, self.max_tokens, self.dtype = config, batch_size, max_tokens, dtype
        self.lengths: list[int] = [0] * batch_size
        self.stored = np.zeros(batch_size, dtype=np.int64)  # first tokens whose entries are there: not written again
        self.pool = PagePool(max_pages or batch_size * pages_for(max_tokens))
        self.grows = device.type != "cpu" if grows is None else grows
        self.num_pages = 0 if self.grows else self.pool.num_pages  # that the tensors have memory for
        self.native: NativeCache | None = None  # made when the native kernels first run
        self.mtp: MTPState | None = None  # of an engine that drafts
        self._log: RowLog | None = None  # made when drafts first come
        self._blocks = BlockTable(batch_size, pages_for(max_tokens))
        with torch.inference_mode(False):  # a tensor of inference mode could not be written outside it
            self.layers: list[LayerCache] = [
                new_layer(config, COMPRESSION_KINDS[ratio], batch_size, self.num_pages, device, dtype)
                for ratio in config.compress_ratios
            ]

    # Pages

    @property
    def max_pages(self) -> int:
        return self.pool.num_pages

    @property
    def num_free_pages(self) -> int:
        return self.pool.num_free

    @property
    def block_table(self) -> np.ndarray:
        """int64 [batch_size, pages per full row]: each row's pages in the order of its tokens, -1 where it has none."""
        return self._blocks.table

    def pages_of(self, slot: int, tokens: int | None = None) -> list[int]:
        """Pages that hold a row's tokens, or its first `tokens`; `pool.retain` keeps them after the row has ended."""
        return self._blocks.pages(slot, pages_for(self.lengths[slot] if tokens is None else tokens))

    def pages_needed(self, slots: Iterable[int], lengths: Iterable[int]) -> int:
        """Pages that rows would take from the pool to hold lengths[i] more tokens each, all in one batch."""
        missing, shared = 0, list[tuple[int, int]]()
        for slot, length in zip(slots, lengths, strict=True):
            missing += self._num_missing(slot, length)
            shared += self._shared_pages_written(slot, length)
        if not shared:
            return missing
        # Of holders that all write to a page the last one keeps it.
        writers = Counter(page for _, page in shared)
        return missing + sum(min(count, self.pool.references(page) - 1) for page, count in writers.items())

    def pages_in_rows(self) -> set[int]:
        """Pages that rows hold."""
        return {page for slot in range(self.batch_size) for page in self._blocks.pages(slot)}

    def entry_rows(self, slot: int, ratio: int, start: int, stop: int) -> np.ndarray:
        """Rows of entries start to stop - 1 of a slot in the entry tensors of layers with this ratio, int64."""
        return self._blocks.entry_rows(slot, np.arange(start, stop), ratio)

    def entry_rows_of(self, slots: np.ndarray, entries: np.ndarray, ratio: int) -> np.ndarray:
        """Rows of entries [n], one of each of slots [n], in the entry tensors of layers with this ratio, int64."""
        return self._blocks.entry_rows(slots, entries, ratio)

    def blank_row(self, ratio: int) -> int:
        """Row of the entry tensors of this ratio that is always zeros."""
        return self.num_pages * (PAGE_TOKENS // ratio)

    # Sequences

    def check_slots(self, slots: Sequence[int]) -> None:
        """ValueError where a row does not exist, or two sequences name the same: each would write over the other."""
        if min(slots) < 0 or max(slots) >= self.batch_size:
            slot = next(slot for slot in slots if not 0 <= slot < self.batch_size)
            raise ValueError(f"cache row {slot}: the cache has rows 0 to {self.batch_size - 1}")
        if len(set(slots)) < len(slots):
            twice = next(slot for slot in slots if slots.count(slot) > 1)
            raise ValueError(
                f"cache row {twice} is named by {slots.count(twice)} sequences of the batch; allowed is one"
            )

    def reserve(self, slots: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> None:
        """Make room for lengths[i] tokens of row slots[i] from position starts[i] on; int64 [n] each.

        ValueError, with nothing changed, where a row is named twice, does not end at its start, or has no room;
        OutOfPagesError where the pages that are free are too few.
        """
        rows, counts = slots.tolist(), lengths.tolist()
        self.check_slots(rows)
        full = False
        for slot, start, length in zip(rows, starts.tolist(), counts, strict=True):
            held = self.lengths[slot]
            if held + length > self.max_tokens:
                raise ValueError(
                    f"cache row {slot} holds {held} tokens and cannot take {length} more: "
                    f"max_tokens is {self.max_tokens}"
                )
            if held != start:
                raise ValueError(f"cache row {slot} holds {held} tokens, the batch starts at {start}")
            full = full or held + length > self._blocks.counts[slot] * PAGE_TOKENS
        # Most steps need no page: looking at the pages of a row would then cost more than the rest.
        needed = self.pages_needed(rows, counts) if full or self.pool.num_shares else 0
        if needed > self.pool.num_free:
            raise OutOfPagesError(f"the batch needs {needed} more pages, {self.pool.num_free} are free")
        if needed:
            self._take_pages(rows, counts)

    def advance(self, slots: np.ndarray, lengths: np.ndarray) -> None:
        """Rows hold lengths[i] more tokens from now on, for which `reserve` made room."""
        for slot, length in zip(slots.tolist(), lengths.tolist(), strict=True):
            self.lengths[slot] += length

    def share(self, source: int, target: int, tokens: int) -> None:
        """Let an empty row hold the pages of the first `tokens` tokens of another; `restore` then gives it the state.

        Without `restore` the row is still empty, and what it writes goes to copies of the pages. ValueError where the
        source holds fewer tokens or the target is not empty.
        """
        if not 0 <= tokens <= self.lengths[source]:
            raise ValueError(f"cache row {source} holds {self.lengths[source]} tokens and cannot share {tokens}")
        self.attach(target, self.pages_of(source, tokens))

    def attach(self, slot: int, pages: Iterable[int]) -> None:
        """Let an empty row hold pages that are in use, in the order of its tokens; ValueError where it is not empty."""
        pages = list(pages)
        if self.lengths[slot] or self._blocks.counts[slot]:
            raise ValueError(f"cache row {slot} is not empty: reset it before it shares pages")
        if len(pages) > pages_for(self.max_tokens):
            raise ValueError(f"{len(pages)} pages for a row of up to {pages_for(self.max_tokens)}")
        self.pool.retain(pages)
        self._blocks.append(slot, pages)

    def keep_streams(self, dtype: torch.dtype) -> MTPState:
        """Hold the state of the MTP block from now on, in snapshots too; `dtype` of the streams. Rows are empty."""
        device = self.layers[0].window.device
        mtp_layers = self.layers[self.config.num_hidden_layers :]
        self.mtp = MTPState(self.config, mtp_layers, self.batch_size, device, dtype)
        return self.mtp

    def expect_drafts(self, slot: int, start: int, count: int) -> None:
        """Before a forward that writes `count` drafts from position `start` on: keep what they overwrite.

        ValueError where the forward is longer than the shortest ring: its own tokens would overwrite each other.
        """
        if self._log is None:
            self._log = RowLog(self.layers[: self.config.num_hidden_layers])
        tokens = start + count - self.lengths[slot]
        if tokens > self._log.most:
            raise ValueError(f"cache row {slot} takes {tokens} tokens with drafts; allowed: {self._log.most}")
        self._log.keep(slot, start, count)

    def truncate(self, slot: int, length: int) -> None:
        """Let a row hold its first `length` tokens alone, to the bit as if the drafts after them had never come.

        ValueError where it holds fewer, or `expect_drafts` was not told of the others before the last forward.
        Entries past the length stay in their pages, where nobody reads them; pages that hold none else are released.
        """
        held = self.lengths[slot]
        if length == held:
            return
        if self._log is None:
            raise ValueError(f"cache row {slot} holds {held} tokens, none of them a draft, and cannot go to {length}")
        self._log.put_back(slot, length, held)
        self.pool.release(self._blocks.cut(slot, pages_for(length)))
        self.lengths[slot] = length

    def reset(self, slot: int) -> None:
        """Empty a row: wipe its state, release its pages."""
        self.lengths[slot] = self.stored[slot] = 0
        if self._log is not None:
            self._log.forget(slot)
        if self.mtp is not None:
            self.mtp.read[slot] = self.mtp.ends[slot] = 0
        self.pool.release(self._blocks.cut(slot, 0))
        for layer in self.layers:
            layer.reset(slot)

    def has_mtp_streams(self, slot: int) -> bool:
        """True if a snapshot of a row would have the state of the MTP block."""
        return self.mtp is not None and self.mtp.pending(slot, self.lengths[slot]) is not None

    def snapshot(self, slot: int) -> Snapshot:
        """Copy the state of a row: with the pages that the row holds now, enough to return to its present length."""
        length = self.lengths[slot]
        pending = None if self.mtp is None else self.mtp.pending(slot, length)
        layers = tuple(clone(layer_views(layer, slot)) for layer in self.layers)
        return Snapshot(length, layers, None if pending is None else pending.clone())

    def restore(self, slot: int, snapshot: Snapshot) -> None:
        """Put a row into the state of a snapshot, of this row or of one whose pages it was given by `share`.

        Pages past the snapshot's length are released. ValueError where the row has not the pages for that length, or
        the snapshot is of another model.
        """
        pages = pages_for(snapshot.length)
        if self._blocks.counts[slot] < pages:
            raise ValueError(
                f"snapshot of {snapshot.length} tokens: cache row {slot} has {self._blocks.counts[slot]} of their "
                f"{pages} pages; share them first"
            )
        state = replace(snapshot, mtp_streams=None)  # which another engine may keep, or not
        place = Snapshot(snapshot.length, tuple(layer_views(layer, slot) for layer in self.layers))
        check_same_kind(state, place)
        values = state.fields()
        for name, tensor in place.fields().items():
            tensor.copy_(values[name])
        if self.mtp is not None:
            self.mtp.restore(slot, snapshot.length, snapshot.mtp_streams)
        self.pool.release(self._blocks.cut(slot, pages))
        self.lengths[slot], self.stored[slot] = snapshot.length, 0

    def is_replaying(self, slot: int) -> bool:
        """True while a row is behind its stored entries: its state is not yet that of its tokens (`replay`)."""
        return self.lengths[slot] < self.stored[slot]

    def replay(self, slot: int, start: int, stored: int) -> None:
        """Let an empty row go on at `start` that has the pages of its first `stored` tokens, whole ones.

        Its entries are read and not written up to `stored`. The state begins empty, as if there were no window before
        `start`: the model's layers take WINDOW tokens each to be right again. Nothing may be kept of the row before.
        """
        assert self.lengths[slot] == 0 and 0 <= start <= stored and stored % PAGE_TOKENS == 0
        assert pages_for(stored) == self._blocks.counts[slot]
        self.lengths[slot], self.stored[slot] = start, stored

    def save(self, slot: int) -> SavedRow:
        """Copy all that a row holds, its entries too: enough to go on from in any row, whoever gets the pages now."""
        pages = self.pages_of(slot)
        return SavedRow(self.snapshot(slot), tuple(c.read_pages(pages) for c in self._compressors()))

    def load(self, slot: int, saved: SavedRow) -> None:
        """Put what `save` copied into a row that is empty, or holds pages of the same first tokens and nothing else.

        The other pages are taken from the pool: OutOfPagesError, with nothing changed, where too few are free.
        """
        held = self._blocks.counts[slot]
        missing = pages_for(saved.snapshot.length) - held
        parts = zip(self._compressors(), saved.entries, strict=True)
        self.load_pages(slot, missing, [entries[held * c.entries_per_page :] for c, entries in parts])
        self.restore(slot, saved.snapshot)

    def load_pages(self, slot: int, count: int, entries: Sequence[Tensor]) -> None:
        """Give an empty row `count` more pages from the pool, with the entries [rows, width] of each compressor.

        OutOfPagesError, with nothing changed, where too few are free.
        """
        assert self.lengths[slot] == 0 and count >= 0
        if count > self.pool.num_free:
            raise OutOfPagesError(f"a saved row needs {count} more pages, {self.pool.num_free} are free")
        own = [self.pool.take() for _ in range(count)]
        self._blocks.append(slot, own)
        self._fit_pages()
        for compressor, rows in zip(self._compressors(), entries, strict=True):
            compressor.write_pages(own, rows)

    def changed(self, slot: int) -> None:
        """To be called by whoever has written to the entries of a row by other means than a forward of the model."""
        if self.native is not None:
            self.native.forget(self._blocks.pages(slot))

    def native_cache(self, kernels: ModuleType) -> NativeCache:
        """This cache as the native kernels see it, made on first use; StaleCacheError as `NativeCache.check`."""
        if self.native is None:
            self.native = NativeCache(kernels, self.layers, self.block_table, self.stored, self.num_pages)
        self.native.check(self.layers)
        return self.native

    # Bytes

    def num_bytes(self) -> dict[str, int]:
        """Bytes of the tensors by component: window, state, entries, index_keys; blank rows with them.

        Entries and index keys are those of all pages; in a cache that grows, of the pages that there is memory for.
        """
        return num_bytes(self.layers)

    def live_bytes(self, rows: int) -> dict[str, int]:
        """Bytes in use by component, as `num_bytes`: the state of so many rows, and the pages that are not free."""
        used: dict[str, int] = {"window": 0, "state": 0, "entries": 0, "index_keys": 0}
        for layer in self.layers:
            used["window"] += rows * layer.window[0].nbytes
            used["state"] += rows * sum(c.kv[0].nbytes + c.score[0].nbytes for c in layer.compressors())
            used["entries"] += self.pool.num_used * (0 if layer.main is None else layer.main.page_bytes)
            used["index_keys"] += self.pool.num_used * (0 if layer.index is None else layer.index.page_bytes)
        if self.mtp is not None:
            used["state"] += rows * self.mtp.row_bytes
        return used

    @property
    def page_bytes(self) -> int:
        """Bytes of a page over all layers."""
        return sum(c.page_bytes for c in self._compressors())

    def _compressors(self) -> list[CompressorState]:
        return [compressor for layer in self.layers for compressor in layer.compressors()]

    def _num_missing(self, slot: int, tokens: int) -> int:
        """Pages that a row lacks to hold `tokens` more."""
        return max(0, pages_for(self.lengths[slot] + tokens) - self._blocks.counts[slot])

    def _shared_pages_written(self, slot: int, tokens: int) -> list[tuple[int, int]]:
        """(index in the row, page) of the row's pages that its next `tokens` tokens belong to and others hold too."""
        if not tokens or not self.pool.num_shares:
            return []
        length, page_at = self.lengths[slot], self._blocks.table.item
        first = max(length, int(self.stored[slot])) // PAGE_TOKENS
        end = min(pages_for(length + tokens), self._blocks.counts[slot])
        written = [(index, page_at(slot, index)) for index in range(first, end)]
        return [(index, page) for index, page in written if self.pool.references(page) > 1]

    def _take_pages(self, slots: list[int], lengths: list[int]) -> None:
        """Give rows the pages for as many more tokens, and copies of their own of shared pages that they write to."""
        copies: list[tuple[int, int]] = []
        for slot, length in zip(slots, lengths, strict=True):
            for index, shared in self._shared_pages_written(slot, length):
                own = self.pool.take()
                # Someone holds the shared page still: it keeps its entries until they are copied.
                self.pool.release((self._blocks.replace(slot, index, own),))
                copies.append((shared, own))
            self._blocks.append(slot, [self.pool.take() for _ in range(self._num_missing(slot, length))])
        self._fit_pages()
        for shared, own in copies:
            for compressor in self._compressors():
                compressor.copy_page(shared, own)

    def _fit_pages(self) -> None:
        """Let the tensors have memory for all pages that were ever taken."""
        if self.pool.num_touched > self.num_pages:
            self._grow(self.pool.num_touched)

    def _grow(self, needed: int) -> None:
        """Move the entries to tensors of at least `needed` pages."""
        wanted = max(needed, 2 * self.num_pages)
        self.num_pages = min(-(-wanted // GROWTH_PAGES) * GROWTH_PAGES, self.pool.num_pages)
        self.native = None
        with torch.inference_mode(False):
            for compressor in self._compressors():
                compressor.grow(self.num_pages)
