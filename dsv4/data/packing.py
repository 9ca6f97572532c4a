"""Best-fit packing of documents into rows; a row is a list of whole documents, run as one ragged batch.

Documents in a row do not interact: each has its own positions and compression windows, so a row is only a token budget.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


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


@dataclass
class Row:
    """A row of whole documents with at most `capacity` tokens."""

    capacity: int
    documents: list[Document] = field(default_factory=list[Document])
    used: int = 0

    def add(self, document: Document) -> None:
        """Append a document that fits."""
        if self.used + len(document) > self.capacity:
            raise ValueError(f"document of {len(document)} tokens in a row with {self.capacity - self.used} left")
        self.documents.append(document)
        self.used += len(document)


def best_fit(rows: Sequence[Row], document: Document) -> Row | None:
    """Return the row with the least room that still fits the document; ties go to the first; None if none fits."""
    fitting = [row for row in rows if row.capacity - row.used >= len(document)]
    return min(fitting, key=lambda row: row.capacity - row.used, default=None)


def split_document(document: Document, limit: int) -> list[Document]:
    """Cut a document that is longer than `limit` into consecutive pieces of at most `limit` tokens."""
    if limit < 1:
        raise ValueError(f"limit {limit}: at least 1 token")
    return [
        Document(document.ids[start : start + limit], document.mask[start : start + limit])
        for start in range(0, len(document), limit)
    ]


def pack(documents: Iterable[Document], rows: int, capacity: int, patience: int = 64) -> list[Row]:
    """Fill `rows` rows from a stream of documents, in the order of arrival, each into its best-fitting row.

    Stops when every row is full or `patience` consecutive pieces have fitted nowhere; pieces that do not fit are
    dropped. A document longer than `capacity` is split first.
    """
    packed = [Row(capacity) for _ in range(rows)]
    misses = 0
    for document in documents:
        for piece in split_document(document, capacity):
            row = best_fit(packed, piece)
            if row is None:
                misses += 1
                continue
            misses = 0
            row.add(piece)
        if misses >= patience or all(row.used == capacity for row in packed):
            break
    return packed


_LEVELS = 8


@dataclass(frozen=True)
class Slot:
    """Tokens start:stop of the piece with index `piece`, placed in a row."""

    piece: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def pack_evenly(lengths: Sequence[int], rows: int, capacity: int, alignment: int = 1) -> list[list[Slot]]:
    """Place every piece into one of `rows` rows of at most `capacity` tokens, best-fit decreasing; no row is empty.

    Rows get about the same number of tokens, unless more pieces would be cut. A piece that fits nowhere whole is cut,
    at a multiple of `alignment` tokens where the room allows: a compressed entry needs a whole window. ValueError if
    the pieces are more than the room, or fewer tokens than rows.
    """
    total = sum(lengths)
    if not rows <= total <= rows * capacity or max(lengths) > capacity:
        raise ValueError(
            f"{total} tokens in pieces of at most {max(lengths, default=0)} for {rows} rows of {capacity}: "
            "at least one per row and at most the room is allowed"
        )
    order = sorted(range(len(lengths)), key=lambda piece: -lengths[piece])
    # A piece longer than the average of what is left gets a row of its own.
    alone, left = 0, total
    while alone < len(order) and lengths[order[alone]] * (rows - alone) > left:
        left -= lengths[order[alone]]
        alone += 1
    average = -(-left // (rows - alone))
    packed, waiting = [], order
    for step in range(_LEVELS + 1):  # the lowest level at which all fit makes the rows even
        level = average + (capacity - average) * step // _LEVELS
        packed, waiting = _best_fit_decreasing(lengths, order[alone:], rows - alone, level)
        if not waiting:
            break
    packed = [[Slot(piece, 0, lengths[piece])] for piece in order[:alone]] + packed
    _place_cut(packed, waiting, lengths, capacity, alignment)
    for row in range(rows):
        if not packed[row]:
            packed[row].append(_take_half(packed, alignment))
    return packed


def _take_half(packed: Sequence[list[Slot]], alignment: int) -> Slot:
    """Cut the longest piece in two and return its second half."""
    row, place = max(
        ((row, place) for row, slots in enumerate(packed) for place in range(len(slots))),
        key=lambda at: len(packed[at[0]][at[1]]),
    )
    slot = packed[row][place]
    half = len(slot) // 2
    cut = slot.start + (half // alignment * alignment or half)
    packed[row][place] = Slot(slot.piece, slot.start, cut)
    return Slot(slot.piece, cut, slot.stop)


def _best_fit_decreasing(
    lengths: Sequence[int], order: Sequence[int], rows: int, level: int
) -> tuple[list[list[Slot]], list[int]]:
    """Place pieces, longest first, each into the fullest row that stays within `level`; also those that fit in none."""
    packed: list[list[Slot]] = [[] for _ in range(rows)]
    rooms = [(level, row) for row in range(rows)]
    waiting: list[int] = []
    for piece in order:
        found = bisect_left(rooms, (lengths[piece], 0))
        if found == len(rooms):
            waiting.append(piece)
            continue
        room, row = rooms.pop(found)
        packed[row].append(Slot(piece, 0, lengths[piece]))
        insort(rooms, (room - lengths[piece], row))
    return packed, waiting


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
