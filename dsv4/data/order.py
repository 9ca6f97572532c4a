"""Order of training pieces: a function of (seed, position) alone, in which every part has its share of the tokens.

A part's documents are cut into pieces, shuffled anew in each epoch. In the mixture, a piece stands at the time at which
its part has had the tokens before it: (tokens of the part before the piece) / (share of the part). A group of rows
takes the pieces of one interval of that time, found by bisection; nothing is replayed. So every document comes once per
epoch of its part, and at any time each part has had its share of the tokens, to within one piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from dsv4.data.shards import ShardFolder
from dsv4.data.stable_hash import stable_hash

_SCALE = 32  # bits of a share


@dataclass(frozen=True)
class Piece:
    """Tokens start:stop of a document; `draw` is unique to part, epoch and piece."""

    part: int
    folder: int
    document: int
    start: int
    stop: int
    draw: int

    def __len__(self) -> int:
        return self.stop - self.start


class PartOrder:
    """Pieces of a part in training order, numbered over all its epochs."""

    def __init__(
        self, number: int, name: str, folders: Sequence[ShardFolder], longest: int, limit: int, seed: int
    ) -> None:
        """Cut documents of more than `longest` tokens into pieces of `limit` (the last of each may be shorter)."""
        self._number, self._name, self._seed = number, name, seed
        lengths = np.concatenate([folder.lengths for folder in folders])
        if not lengths.sum():
            raise ValueError(f"{name}: no tokens in {', '.join(str(folder.folder) for folder in folders)}")
        counts = np.where(lengths > longest, -(-lengths // limit), lengths > 0)
        document = np.repeat(np.arange(len(lengths)), counts)
        nth = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        self._start = nth * limit
        self._stop = np.where(
            counts[document] > 1, np.minimum(self._start + limit, lengths[document]), lengths[document]
        )
        sizes = np.array([len(folder) for folder in folders])
        self._folder = np.searchsorted(np.cumsum(sizes), document, side="right")
        self._document = document - (np.cumsum(sizes) - sizes)[self._folder]
        self.pieces, self.tokens = len(document), int(lengths.sum())
        self._epoch = lru_cache(2)(self._shuffle)

    def _shuffle(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Permutation of the pieces in an epoch, and the tokens before each and after all [pieces + 1]."""
        # NumPy promises that the raw stream of a bit generator never changes, but not so for permutation().
        raw = np.random.PCG64(stable_hash("epoch", self._seed, self._name, epoch)).random_raw(self.pieces)
        order = np.argsort(raw, kind="stable")
        return order, np.concatenate(([0], np.cumsum((self._stop - self._start)[order])))

    def count_before(self, tokens: int) -> int:
        """Number of pieces that have fewer than `tokens` tokens before them."""
        epoch, rest = divmod(tokens, self.tokens)
        before = self._epoch(epoch)[1]
        return epoch * self.pieces + int(np.searchsorted(before[:-1], rest, side="left"))

    def tokens_before(self, count: int) -> int:
        """Tokens of the first `count` pieces."""
        epoch, rest = divmod(count, self.pieces)
        return epoch * self.tokens + (int(self._epoch(epoch)[1][rest]) if rest else 0)

    def lengths(self, start: int, stop: int) -> list[int]:
        """Tokens of each of the pieces number `start` to `stop`."""
        found: list[int] = []
        for epoch in range(start // self.pieces, -(-stop // self.pieces)):
            first, last = (min(max(count - epoch * self.pieces, 0), self.pieces) for count in (start, stop))
            found += np.diff(self._epoch(epoch)[1][first : last + 1]).tolist()
        return found

    def piece(self, count: int) -> Piece:
        """Piece number `count`."""
        epoch, place = divmod(count, self.pieces)
        row = int(self._epoch(epoch)[0][place])
        values = (self._folder[row], self._document[row], self._start[row], self._stop[row])
        folder, document, start, stop = map(int, values)
        return Piece(self._number, folder, document, start, stop, stable_hash("piece", self._seed, self._name, count))


class MixtureOrder:
    """Pieces of several parts by their shares, in groups of `group_tokens` tokens, plus less than one piece.

    `epoch_groups`, in place of `group_tokens`: groups of an epoch of the only part, so that no group spans two.
    """

    def __init__(
        self, parts: Sequence[PartOrder], weights: Sequence[float], group_tokens: int, epoch_groups: int = 0
    ) -> None:
        if any(not weight > 0 for weight in weights):
            raise ValueError(f"weights {list(weights)}: more than 0 each is allowed")
        if epoch_groups and len(parts) > 1:
            raise ValueError(f"groups of an epoch of {len(parts)} parts, whose epochs differ; allowed: one part")
        self._parts, self._group_tokens, self._epoch_groups = parts, group_tokens, epoch_groups
        self._shares = [max(1, round(weight / sum(weights) * (1 << _SCALE))) for weight in weights]
        self._bounds = lru_cache(4)(self._find_bounds)

    def group(self, number: int) -> Iterator[Piece]:
        """Pieces of a group, part by part."""
        for part, start, stop in self._ranges(number):
            yield from map(part.piece, range(start, stop))

    def lengths(self, number: int) -> list[int]:
        """Tokens of each of a group's pieces."""
        return [length for part, start, stop in self._ranges(number) for length in part.lengths(start, stop)]

    def _ranges(self, number: int) -> Iterator[tuple[PartOrder, int, int]]:
        return zip(self._parts, self._bounds(number), self._bounds(number + 1), strict=True)

    def _tokens_wanted(self, number: int) -> int:
        """Tokens that all earlier groups have at least."""
        if not self._epoch_groups:
            return number * self._group_tokens
        epoch, place = divmod(number, self._epoch_groups)
        return epoch * self._parts[0].tokens + place * self._parts[0].tokens // self._epoch_groups

    def _find_bounds(self, number: int) -> tuple[int, ...]:
        """Pieces of each part before a group: the fewest, in the order of time, with all earlier groups' tokens."""
        wanted = self._tokens_wanted(number)
        if wanted == 0:
            return (0,) * len(self._parts)
        low, high = 0, 1  # invariant below: fewer tokens than wanted before `low`, enough before `high`
        while self._tokens(self._at(high)) < wanted:
            low, high = high, high * 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._tokens(self._at(middle)) < wanted else (low, middle)
        bounds, following = list(self._at(low)), self._at(high)
        for part, count in enumerate(following):  # pieces at the same time, part by part
            bounds[part] = count
            if self._tokens(bounds) >= wanted:
                break
        return tuple(bounds)

    def _at(self, time: int) -> list[int]:
        """Pieces of each part before a time."""
        return [
            part.count_before(time * share >> _SCALE) for part, share in zip(self._parts, self._shares, strict=True)
        ]

    def _tokens(self, counts: Sequence[int]) -> int:
        return sum(part.tokens_before(count) for part, count in zip(self._parts, counts, strict=True))
