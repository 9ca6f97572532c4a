"""Best-fit packing of documents into rows; a row is a list of whole documents, run as one ragged batch.

Documents in a row do not interact: each has its own positions and compression windows, so a row is only a token budget.
"""

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
