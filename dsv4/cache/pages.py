"""Pages of PAGE_TOKENS tokens: an allocator with reference counts, and the block tables of sequences. No tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from dsv4.config import PAGE_TOKENS
from dsv4.kernels.attention.views import entry_rows


class OutOfPagesError(ValueError):
    """A batch needs more pages than are free."""


def pages_for(tokens: int) -> int:
    """Pages that hold a sequence of `tokens` tokens."""
    return -(-tokens // PAGE_TOKENS)


class PagePool:
    """Allocator of pages 0 to num_pages - 1. A page is free again when the last of its holders releases it.

    The page released last is handed out first, and a page that was never used only when no other is free, the lowest
    first: memory that is handed out lazily stays small.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.num_shares = 0  # references beyond the first of each page
        self._references: list[int] = []  # of the pages that were ever used
        self._released: list[int] = []

    @property
    def num_free(self) -> int:
        return self.num_pages - self.num_used

    @property
    def num_used(self) -> int:
        return len(self._references) - len(self._released)

    @property
    def num_touched(self) -> int:
        """Pages that were ever used: 0 to num_touched - 1."""
        return len(self._references)

    def references(self, page: int) -> int:
        """Number of holders of a page; 0: it is free."""
        return self._references[page] if 0 <= page < len(self._references) else 0

    def take(self) -> int:
        """A free page, held once. OutOfPagesError if there is none."""
        if self._released:
            page = self._released.pop()
            self._references[page] = 1
            return page
        if len(self._references) == self.num_pages:
            raise OutOfPagesError(f"all {self.num_pages} pages of the cache are in use")
        self._references.append(1)
        return len(self._references) - 1

    def retain(self, pages: Iterable[int]) -> None:
        """Hold pages that are in use once more; ValueError names one that is not."""
        pages = list(pages)
        self._expect_used(pages)
        for page in pages:
            self._references[page] += 1
        self.num_shares += len(pages)

    def release(self, pages: Iterable[int]) -> None:
        """Hold pages once less for each time they are named; ValueError, with nothing changed, names one that is not
        in use or not held so often."""
        pages = list(pages)
        self._expect_used(pages)
        for page, times in Counter(pages).items():
            if times > self._references[page]:
                raise ValueError(f"page {page} is held {self._references[page]} times and cannot be released {times}")
        for page in reversed(pages):  # so that the first is handed out first
            self._references[page] -= 1
            if self._references[page] == 0:
                self._released.append(page)
            else:
                self.num_shares -= 1

    def _expect_used(self, pages: list[int]) -> None:
        free = next((page for page in pages if self.references(page) == 0), None)
        if free is not None:
            raise ValueError(f"page {free} is not in use: only pages in use can be shared or released")


class BlockTable:
    """Pages of each cache row, in the order of its tokens.

    `table` int64 [rows, most pages per row], -1 where a row has no page; the array stays the same one, so that kernels
    may keep its address.
    """

    def __init__(self, rows: int, pages_per_row: int) -> None:
        self.table = np.full((rows, pages_per_row), -1, dtype=np.int64)
        self.counts = [0] * rows  # pages that each row has

    def pages(self, row: int, count: int | None = None) -> list[int]:
        """A row's pages, or its first `count`."""
        held = self.counts[row]
        return self.table[row, : held if count is None else min(count, held)].tolist()

    def append(self, row: int, pages: Sequence[int]) -> None:
        first = self.counts[row]
        self.table[row, first : first + len(pages)] = pages
        self.counts[row] = first + len(pages)

    def replace(self, row: int, index: int, page: int) -> int:
        """Put a page in another's place. Returns the other."""
        old = int(self.table[row, index])
        self.table[row, index] = page
        return old

    def cut(self, row: int, count: int) -> list[int]:
        """Keep a row's first `count` pages. Returns those that it loses."""
        lost = self.table[row, count : self.counts[row]].tolist()
        self.table[row, count : self.counts[row]] = -1
        self.counts[row] = min(count, self.counts[row])
        return lost

    def entry_rows(self, rows: np.ndarray | int, entries: np.ndarray, ratio: int) -> np.ndarray:
        """Rows of the entry tensors of a ratio where entries (by number in their sequence) of cache rows lie, int64."""
        return entry_rows(self.table, rows, entries, ratio)
