"""Batches from tokenised shards: any batch by its number, the same in every process, so a position is one number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol

import numpy as np

from dsv4.data.augment import Augmenter, Rates
from dsv4.data.order import MixtureOrder, PartOrder, Piece
from dsv4.data.packing import Document, TokenBatch, pack_evenly, split_document
from dsv4.data.shards import ShardFolder
from dsv4.data.stable_hash import stable_hash
from dsv4.tokenizer import Tokenizer

GROUP_ROWS = 128  # rows packed together
_GROWTH = 32  # 1/32 of the room is for what `Rates` add
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
    """Tokens per row, most tokens of a document in it (a longer one is cut), rows packed together.

    Cuts are at multiples of `alignment`, the lengths of the compression windows, so that no window is cut.
    """

    tokens: int
    document_tokens: int
    group_rows: int = GROUP_ROWS
    alignment: int = _LARGEST_ALIGNMENT

    def __post_init__(self) -> None:
        if not 1 < self.document_tokens <= self.tokens:
            raise ValueError(f"documents of {self.document_tokens} tokens in rows of {self.tokens}; allowed: 2 to that")
        if self.group_rows < 2 or self.alignment < 1:
            raise ValueError(f"{self.group_rows} rows per group, alignment {self.alignment}; allowed: 2 and 1 or more")

    def piece_tokens(self, growing: bool) -> int:
        """Most tokens of a piece cut from a longer document, with room to grow by changes of the text."""
        room = self.document_tokens - (max(8, self.document_tokens // 64) if growing else 0)
        return max(1, room // self.alignment * self.alignment or room)

    def group_tokens(self, growing: bool) -> int:
        """Tokens drawn for a group: with a piece's overshoot and the growth they fit."""
        room = self.group_rows * self.tokens
        return room - self.piece_tokens(growing) - (room // _GROWTH if growing else 0)


class MixtureLoader:
    """Rows of a mixture of parts, packed in groups. A group's rows are a function of (seed, group) alone."""

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
        self._seed, self.shape = seed, shape
        self._stored = [part for part in parts if part.folders is not None]
        self._generated = generated
        total = sum(part.weight for part in parts)
        if not parts or (generated is None) != (len(self._stored) == len(parts)) or len(parts) - len(self._stored) > 1:
            raise ValueError("a mixture has parts, and at most one of generated documents, with their source")
        self._augment = Augmenter(tokenizer, rates) if rates else None
        limit, group_tokens = shape.piece_tokens(bool(rates)), shape.group_tokens(bool(rates))
        stored_share = sum(part.weight for part in self._stored) / total
        self._generated_tokens = round(group_tokens * (1 - stored_share)) if generated else 0
        self._order = None
        if self._stored:
            orders = [
                PartOrder(number, part.name, part.folders or (), limit, seed)
                for number, part in enumerate(self._stored)
            ]
            weights = [part.weight for part in self._stored]
            self._order = MixtureOrder(orders, weights, group_tokens - self._generated_tokens)

    def group(self, number: int) -> list[list[Tokens]]:
        """Rows of a group, each a list of documents; every row has at least one."""
        pieces = [*self._stored_pieces(number), *self._generated_pieces(number)]
        slots = pack_evenly(
            [len(ids) for ids, _ in pieces], self.shape.group_rows, self.shape.tokens, self.shape.alignment
        )
        rows = [[_cut(pieces[slot.piece], slot.start, slot.stop) for slot in row] for row in slots]
        # The first rows have the longest pieces.
        order = sorted(range(len(rows)), key=lambda row: stable_hash("row", self._seed, number, row))
        return [rows[row] for row in order]

    def _stored_pieces(self, number: int) -> Iterator[Tokens]:
        if self._order is None:
            return
        pieces = list(self._order.group(number))
        shape = self.shape
        room = shape.group_rows * shape.tokens - self._generated_tokens - sum(map(len, pieces))
        for piece in pieces:
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

    def _generated_pieces(self, number: int) -> Iterator[Tokens]:
        """Documents drawn until the next one does not fit in their share."""
        if self._generated is None:
            return
        random = Random(stable_hash("generated", self._seed, number))
        left = self._generated_tokens
        while True:
            document = self._generated.draw(random)
            left -= len(document)
            if left < 0:
                return
            for piece in split_document(document, self.shape.document_tokens):
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
