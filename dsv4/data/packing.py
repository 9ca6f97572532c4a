"""Packing of documents into rows; a row is a list of documents, run as one ragged batch.

Documents in a row do not interact: each has its own positions and compression windows, so a row is only a token budget.
But a row is often a whole step of training, so it should hold documents of all lengths, and with them of all kinds.
"""

import itertools
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass

_FILLERS = (16, 8, 4)  # 1/16 of the tokens, the shortest pieces, fill what room is left; more where not all would fit
_SPARE = 64  # 1/64 of the room stays free where no piece may be cut: full rows would be of pieces of one length


@dataclass(frozen=True)
class Document:
    """Token ids and a loss mask of the same length: 1 for ids that are targets, else 0."""

    ids: tuple[int, ...]
    mask: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.mask):
            raise ValueError(f"document of {len(self.ids)} ids with a mask of {len(self.mask)}: one mask value per id")

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class TokenBatch:
    """One ragged row: token ids per document and loss masks of the same lengths, 1 for tokens that are targets."""

    documents: list[list[int]]
    loss_masks: list[list[int]]

    @property
    def tokens(self) -> int:
        """Tokens in the batch."""
        return sum(map(len, self.documents))


def split_document(document: Document, limit: int) -> list[Document]:
    """Cut a document that is longer than `limit` into consecutive pieces of at most `limit` tokens."""
    if limit < 1:
        raise ValueError(f"limit {limit}: at least 1 token")
    return [
        Document(document.ids[start : start + limit], document.mask[start : start + limit])
        for start in range(0, len(document), limit)
    ]


@dataclass(frozen=True)
class Slot:
    """Tokens start:stop of the piece with index `piece`, placed in a row."""

    piece: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def pack_evenly(
    lengths: Sequence[int],
    rows: int,
    capacity: int,
    alignment: int = 1,
    names: Sequence[Hashable] = (),
    whole: Collection[int] = (),
) -> list[list[Slot]]:
    """Place every piece into one of `rows` rows of at most `capacity` tokens, each of all lengths; none is empty.

    Rows get about the same number of tokens, unless more pieces would be cut. Pieces of one name (None: it has none)
    are in different rows where there is room. A piece that fits nowhere whole is cut, at a multiple of `alignment`
    tokens where the room allows: a compressed entry needs a whole window. Those of `whole` are not, if there are as
    many pieces as rows. ValueError if the pieces are more than the room, or fewer tokens than rows, or if those of
    `whole` do not fit: in `rows_needed` rows they do.
    """
    total = sum(lengths)
    if not rows <= total <= rows * capacity or max(lengths) > capacity:
        raise ValueError(
            f"{total} tokens in pieces of at most {max(lengths, default=0)} for {rows} rows of {capacity}: "
            "at least one per row and at most the room is allowed"
        )
    pieces = _Pieces(lengths, names)
    alone, rest = pieces.parted(rows)
    filling = _fill_mixed(pieces, rest, rows - len(alone), capacity)
    if filling is None:
        alone, order = [], sorted(pieces.by_length, key=lambda piece: piece not in whole)
        filling = _fill_by_length(_Pieces(lengths), order, rows, capacity)  # as in rows_needed, by no names
        if any(piece in whole for piece in filling.waiting):
            raise ValueError(f"{len(whole)} pieces that may not be cut need more than {rows} rows of {capacity} tokens")
    packed = [
        [Slot(piece, 0, lengths[piece]) for piece in row] for row in (*([piece] for piece in alone), *filling.rows)
    ]
    _place_cut(packed, filling.waiting, lengths, capacity, alignment)
    _fill_empty(packed, alignment, whole)
    return packed


def rows_needed(lengths: Sequence[int], capacity: int) -> int:
    """Rows of at most `capacity` tokens in which `pack_evenly` has to cut none of the pieces."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        found = bisect_left(rooms, length)
        room = rooms.pop(found) if found < len(rooms) else capacity
        insort(rooms, room - length)
    spare = -(-sum(lengths) * _SPARE // ((_SPARE - 1) * capacity))
    return max(len(rooms), min(spare, len(lengths)))


class _Pieces:
    """Lengths of the pieces, and the names that more than one of them has."""

    def __init__(self, lengths: Sequence[int], names: Sequence[Hashable] = ()) -> None:
        self.lengths = lengths
        self.by_length = sorted(range(len(lengths)), key=lambda piece: -lengths[piece])
        counts = Counter(names)
        self.names = [
            name if name is not None and counts[name] > 1 else None for name in names or [None] * len(lengths)
        ]

    def parted(self, rows: int) -> tuple[list[int], list[int]]:
        """Pieces longer than the average of what is left, which get a row of their own, and the others."""
        alone, left = 0, sum(self.lengths)
        while alone < len(self.by_length) and self.lengths[self.by_length[alone]] * (rows - alone) > left:
            left -= self.lengths[self.by_length[alone]]
            alone += 1
        return self.by_length[:alone], self.by_length[alone:]


class _Filling:
    """Rows that are filled to a level; `waiting`: pieces for which no row had room, or `apart`: none without a copy."""

    def __init__(self, pieces: _Pieces, rows: int, level: int, apart: bool = False) -> None:
        self._pieces, self._apart = pieces, apart
        self.rows: list[list[int]] = [[] for _ in range(rows)]
        self.waiting: list[int] = []
        self._rooms = [(level, row) for row in range(rows)]
        self._held: list[set[Hashable]] = [set() for _ in range(rows)]

    def add(self, piece: int, emptiest: bool = False) -> bool:
        """Place a piece into the fullest, or emptiest, row with room, if possible without a copy; False: it waits."""
        length, name = self._pieces.lengths[piece], self._pieces.names[piece]
        places = range(bisect_left(self._rooms, (length, 0)), len(self._rooms))
        if emptiest:
            places = places[::-1]
        found = (at for at in places if name is None or name not in self._held[self._rooms[at][1]])
        place = next(found, places[0] if places and not self._apart else None)
        if place is None:
            self.waiting.append(piece)
            return False
        room, row = self._rooms.pop(place)
        self.rows[row].append(piece)
        if name is not None:
            self._held[row].add(name)
        insort(self._rooms, (room - length, row))
        return True


def _fill_mixed(pieces: _Pieces, chosen: Sequence[int], rows: int, capacity: int) -> _Filling | None:
    """Rows with all of the `chosen` pieces (longest first), whole and as mixed as they fit; None if they do not."""
    total = sum(pieces.lengths[piece] for piece in chosen)
    average = -(-total // rows)
    # The lowest level at which all fit makes the rows even.
    levels = sorted({average, *(average + (capacity - average >> shift) for shift in range(6))})
    parted = [_parted_by_length(pieces.lengths, chosen, total // share) for share in _FILLERS]
    aparts = (True, False) if any(name is not None for name in pieces.names) else (False,)
    for apart, level, (spread, fillers) in itertools.product(aparts, levels, parted):
        filling = _Filling(pieces, rows, level, apart)
        if all(filling.add(piece, emptiest=True) for piece in spread) and all(map(filling.add, fillers)):
            return filling
    for level in levels:
        filling = _fill_by_length(pieces, chosen, rows, level)
        if not filling.waiting:
            return filling
    return None


def _parted_by_length(
    lengths: Sequence[int], chosen: Sequence[int], filler_tokens: int
) -> tuple[Sequence[int], Sequence[int]]:
    """Pieces that are to be spread over the rows, and the shortest, `filler_tokens` of them or some more.

    Those that are spread are sorted by length to a factor of two alone, and else as they come: by length to the token,
    the pieces of a small corpus would share their rows with the same others in every epoch.
    """
    last = len(chosen)
    while last and filler_tokens > 0:
        last -= 1
        filler_tokens -= lengths[chosen[last]]
    return sorted(chosen[:last], key=lambda piece: (-lengths[piece].bit_length(), piece)), chosen[last:]


def _fill_by_length(pieces: _Pieces, chosen: Sequence[int], rows: int, level: int) -> _Filling:
    """Best fit, longest first: what fits most, but rows of pieces of about one length."""
    filling = _Filling(pieces, rows, level)
    for piece in chosen:
        filling.add(piece)
    return filling


def _place_cut(
    packed: Sequence[list[Slot]], waiting: Sequence[int], lengths: Sequence[int], capacity: int, alignment: int
) -> None:
    """Place the waiting pieces into the room of all rows, cut where none has enough."""
    if not waiting:
        return
    rooms = sorted((capacity - sum(map(len, slots)), row) for row, slots in enumerate(packed))
    for piece in waiting:
        start = 0
        while start < lengths[piece]:
            rest = lengths[piece] - start
            found = min(bisect_left(rooms, (rest, 0)), len(rooms) - 1)  # the least room that is enough, else the most
            room, row = rooms.pop(found)
            taken = rest if room >= rest else room // alignment * alignment or room
            packed[row].append(Slot(piece, start, start + taken))
            insort(rooms, (room - taken, row))
            start += taken


def _fill_empty(packed: Sequence[list[Slot]], alignment: int, whole: Collection[int]) -> None:
    """Give every empty row the last piece of the fullest row with several; without one, half of the longest piece."""
    for slots in packed:
        if slots:
            continue
        several = [row for row in packed if len(row) > 1]
        if several:
            slots.append(max(several, key=lambda row: sum(map(len, row))).pop())
            continue
        row = max((row for row in packed if row), key=lambda row: (row[0].piece not in whole, len(row[0])))
        slot = row[0]
        half = len(slot) // 2
        cut = slot.start + (half // alignment * alignment or half)
        row[0] = Slot(slot.piece, slot.start, cut)
        slots.append(Slot(slot.piece, cut, slot.stop))
