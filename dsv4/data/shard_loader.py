"""Batches from tokenised shards: any batch by its number, the same in every process, so a position is one number."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol

import numpy as np

from dsv4.data.augment import Augmenter, Rates
from dsv4.data.order import MixtureOrder, PartOrder, Piece
from dsv4.data.packing import Document, TokenBatch, pack_evenly, rows_needed, split_document
from dsv4.data.shards import ShardFolder
from dsv4.data.stable_hash import stable_hash
from dsv4.tokenizer import Tokenizer

GROUP_ROWS = 128  # most rows packed together
_GROWTH = 32  # 1/32 of the room is for what `Rates` add
_SPARE = 128  # without them 1/128 stays free: full rows would be of pieces of one length
_LARGEST_ALIGNMENT = 128

Tokens = tuple[np.ndarray, np.ndarray | None]  # ids, and the loss mask or None if every token is a target


class DocumentSource(Protocol):
    """Documents made on demand."""

    def draw(self, random: Random, /) -> Document: ...


@dataclass(frozen=True)
class Part:
    """Shards with a share of a mixture's tokens. `loss`: on every token ("all"), or as the documents have it ("mask").

    For generated documents, `folders` is None.
    """

    name: str
    weight: float
    folders: tuple[ShardFolder, ...] | None
    loss: str = "mask"

    def __post_init__(self) -> None:
        if self.loss not in ("all", "mask"):
            raise ValueError(f"{self.name}: loss is {self.loss!r}; allowed: all, mask")
        if not self.weight > 0:
            raise ValueError(f"{self.name}: weight {self.weight}; allowed: more than 0")


@dataclass(frozen=True)
class RowShape:
    """Tokens per row, most tokens of a document in it (a longer one is cut), most rows packed together.

    Cuts are at multiples of `alignment`, the lengths of the compression windows, so that no window is cut. `whole`:
    no document is cut but those that are longer, so that rows may be less full.
    """

    tokens: int
    document_tokens: int
    group_rows: int = GROUP_ROWS
    alignment: int = _LARGEST_ALIGNMENT
    whole: bool = False

    def __post_init__(self) -> None:
        if not 1 < self.document_tokens <= self.tokens:
            raise ValueError(f"documents of {self.document_tokens} tokens in rows of {self.tokens}; allowed: 2 to that")
        if self.group_rows < 2 or self.alignment < 1:
            raise ValueError(f"{self.group_rows} rows per group, alignment {self.alignment}; allowed: 2 and 1 or more")

    def longest(self, growing: bool) -> int:
        """Most tokens of a document that stays whole, with room to grow by changes of the text."""
        return max(1, self.document_tokens - (max(8, self.document_tokens // 64) if growing else 0))

    def piece_tokens(self, growing: bool) -> int:
        """Most tokens of a piece cut from a longer document."""
        room = self.longest(growing)
        return room // self.alignment * self.alignment or room

    def group_tokens(self, rows: int, growing: bool) -> int:
        """Tokens drawn for a group of so many rows: with a piece's overshoot and the growth they fit."""
        room = rows * self.tokens
        return room - self.longest(growing) - room // (_GROWTH if growing else _SPARE)

    def rows(self, tokens: int, growing: bool) -> int:
        """Rows that so many tokens fit into with their growth."""
        return -(-tokens // (self.tokens - self.tokens // (_GROWTH if growing else _SPARE)))

    def rows_within(self, tokens: float, growing: bool) -> int:
        """Rows of a group of about `tokens`, at least of eight of the longest pieces: one more of these has room."""
        fewest = max(2, -(-8 * self.longest(growing) // self.tokens))
        return min(self.group_rows, max(fewest, int(min(tokens / self.tokens, self.group_rows))))


class MixtureLoader:
    """Rows of a mixture of parts, packed in groups. A group's rows are a function of (seed, group) alone.

    Shards alone, without other parts, are packed epoch by epoch. In a mixture a group is no more than the shortest
    epoch of a part, if that is some rows.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        tokenizer: Tokenizer,
        seed: int,
        shape: RowShape,
        rates: Rates | None = None,
        generated: DocumentSource | None = None,
    ) -> None:
        rates = rates or Rates()
        growing = bool(rates)
        self._seed, self.shape = seed, shape
        self._stored = [part for part in parts if part.folders is not None]
        self._generated = generated
        if not parts or (generated is None) != (len(self._stored) == len(parts)) or len(parts) - len(self._stored) > 1:
            raise ValueError("a mixture has parts, and at most one of generated documents, with their source")
        if shape.whole and growing:
            raise ValueError(f"whole documents, and {rates}, by which they would grow; allowed: without changes")
        self._augment = Augmenter(tokenizer, rates) if rates else None
        orders = [
            PartOrder(number, part.name, part.folders or (), shape.longest(growing), shape.piece_tokens(growing), seed)
            for number, part in enumerate(self._stored)
        ]
        self._order: MixtureOrder | None = None
        self._generated_tokens = self._epoch_groups = 0
        if len(orders) == len(parts) == 1:
            self._group_by_epochs(orders[0], growing)
        else:
            self._group_by_shares(orders, sum(part.weight for part in parts), growing)
        self._firsts = [0]  # of whole documents: rows before each group, as far as they were asked for

    def _group_by_epochs(self, part: PartOrder, growing: bool) -> None:
        """Groups of one part, each within an epoch."""
        longest = self.shape.longest(growing)
        groups = -(-part.tokens // self.shape.group_tokens(self.shape.group_rows, growing))
        self._epoch_groups = groups = min(groups, max(1, part.tokens // longest))  # no group without a piece
        self._order = MixtureOrder([part], [1.0], part.tokens, groups)
        self.group_rows = self.shape.rows(-(-part.tokens // groups) + (longest if groups > 1 else 0), growing)

    def _group_by_shares(self, orders: Sequence[PartOrder], total: float, growing: bool) -> None:
        """Groups of a mixture whose weights have the sum `total`."""
        weights = [part.weight for part in self._stored]
        epochs = [order.tokens * total / weight for order, weight in zip(orders, weights, strict=True)]
        self.group_rows = self.shape.rows_within(min(epochs, default=math.inf), growing)
        tokens = self.shape.group_tokens(self.group_rows, growing)
        if self._generated is not None:
            self._generated_tokens = round(tokens * (1 - sum(weights) / total))
        if orders:
            self._order = MixtureOrder(orders, weights, tokens - self._generated_tokens)

    def locate(self, row: int) -> tuple[int, int]:
        """Group of a row by its number, and its place in the group."""
        if not self.shape.whole:
            return divmod(row, self.group_rows)
        while self._firsts[-1] <= row:
            self._firsts.append(self._firsts[-1] + self._rows_of(len(self._firsts) - 1))
        group = bisect_right(self._firsts, row) - 1
        return group, row - self._firsts[group]

    def epoch_rows(self, epochs: int) -> int:
        """Rows of the first epochs. ValueError for a mixture, whose parts have epochs of different lengths."""
        if not self._epoch_groups:
            raise ValueError("epochs of a mixture; allowed: of one part of shards")
        return sum(map(self._rows_of, range(epochs * self._epoch_groups)))

    def _rows_of(self, number: int) -> int:
        """Rows of a group: as many as hold the shards' documents whole, if they have to be."""
        if not self.shape.whole or self._order is None:
            return self.group_rows
        lengths, tokens = self._order.lengths(number), self.shape.tokens
        return max(rows_needed(lengths, tokens), -(-(sum(lengths) + self._generated_tokens) // tokens))

    def group(self, number: int) -> list[list[Tokens]]:
        """Rows of a group, each a list of documents; every row has at least one."""
        rows, shape = self._rows_of(number), self.shape
        stored = list(self._order.group(number)) if self._order is not None else []
        pieces = list(self._read_all(stored, rows))
        room = rows * shape.tokens - sum(len(ids) for ids, _ in pieces)
        pieces += self._generated_pieces(number, room, least=0 if pieces else 1)
        names: list[Hashable] = [(piece.part, piece.folder, piece.document, piece.start) for piece in stored]
        names += [None] * (len(pieces) - len(stored))
        lengths, whole = [len(ids) for ids, _ in pieces], range(len(stored) if shape.whole else 0)
        slots = pack_evenly(lengths, rows, shape.tokens, shape.alignment, names, whole)
        filled = [[_cut(pieces[slot.piece], slot.start, slot.stop) for slot in row] for row in slots]
        # The first rows have the longest pieces.
        order = sorted(range(rows), key=lambda row: stable_hash("row", self._seed, number, row))
        return [filled[row] for row in order]

    def _read_all(self, stored: Sequence[Piece], rows: int) -> Iterator[Tokens]:
        shape = self.shape
        room = rows * shape.tokens - self._generated_tokens - sum(map(len, stored))
        for piece in stored:
            ids, mask = self._read(piece)
            if self._augment is not None and mask is None:
                changed = self._augment.apply(ids, piece.draw, min(shape.document_tokens, len(ids) + room))
                room -= len(changed) - len(ids)
                ids = changed
            if self._stored[piece.part].loss == "all":
                mask = None
            yield ids, mask

    def _read(self, piece: Piece) -> Tokens:
        folders = self._stored[piece.part].folders
        assert folders is not None
        return _cut(folders[piece.folder].document(piece.document), piece.start, piece.stop)

    def _generated_pieces(self, number: int, room: int, least: int) -> Iterator[Tokens]:
        """Documents of the generated part's share, at least `least` of them, in at most `room` tokens.

        They are those that begin in a window of the share's tokens, somewhere in a long sequence of documents: groups
        have the share in the mean, and long documents as often as they are drawn, however small the window. One that is
        longer than the room left ends them: of groups of a few rows with such documents the share is smaller.
        """
        if self._generated is None:
            return
        random, longest = Random(stable_hash("generated", self._seed, number)), self.shape.document_tokens
        place, taken = -round((1 + random.random()) * longest), 0
        while place < self._generated_tokens or taken < least:
            document = self._generated.draw(random)
            begins, place = place, place + len(document)
            if begins < 0:
                continue
            pieces = split_document(document, longest)
            if taken < least:
                pieces = pieces[: room // longest]
            elif len(document) > room:
                return
            taken, room = taken + 1, room - len(document)
            for piece in pieces:
                mask = np.array(piece.mask, np.uint8)
                yield np.array(piece.ids, np.uint32), None if mask.all() else mask


def _cut(tokens: Tokens, start: int, stop: int) -> Tokens:
    ids, mask = tokens
    return ids[start:stop], None if mask is None else mask[start:stop]


def make_batch(row: Sequence[Tokens]) -> TokenBatch:
    """Token lists of a row."""
    ids: list[list[int]] = [ids.tolist() for ids, _ in row]
    masks: list[Any] = [[1] * len(ids) if mask is None else mask.tolist() for ids, mask in row]
    return TokenBatch(ids, masks)
