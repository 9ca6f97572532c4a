import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsv4.data.packing import Document, Row, best_fit, pack, split_document


def document(length: int, start: int = 0) -> Document:
    return Document(tuple(range(start, start + length)), tuple(i % 2 for i in range(length)))


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), max_size=60), st.integers(1, 5), st.integers(1, 64))
@example(lengths=[10, 12, 1], rows=4, capacity=3)  # the last one fits, after more misses than there are documents
def test_rows_hold_whole_documents_within_their_capacity(lengths: list[int], rows: int, capacity: int) -> None:
    documents = [document(length, 1000 * n) for n, length in enumerate(lengths)]
    whole = [piece for d in documents for piece in split_document(d, capacity)]
    packed = pack(documents, rows, capacity, patience=len(whole) + 1)
    assert len(packed) == rows
    assert all(row.used == sum(map(len, row.documents)) <= capacity for row in packed)
    placed = [d for row in packed for d in row.documents]
    assert all(d in whole for d in placed) and len({d.ids for d in placed}) == len(placed)
    # What was left out fits nowhere: packing never wastes room.
    room = max(row.capacity - row.used for row in packed)
    assert all(len(d) > room for d in whole if d not in placed) or len(placed) == len(whole)


def test_the_fullest_row_that_still_fits_is_chosen() -> None:
    rows = [Row(10), Row(10), Row(10)]
    rows[0].add(document(3))
    rows[1].add(document(6))
    rows[2].add(document(6, 50))
    assert best_fit(rows, document(4)) is rows[1]
    assert best_fit(rows, document(5)) is rows[0]
    assert best_fit(rows, document(11)) is None


def test_long_documents_are_cut_and_bad_ones_refused() -> None:
    pieces = split_document(document(10), 4)
    assert [len(p) for p in pieces] == [4, 4, 2]
    assert sum((p.ids for p in pieces), ()) == document(10).ids
    with pytest.raises(ValueError, match="one mask value per id"):
        Document((1, 2), (1,))
    with pytest.raises(ValueError, match="in a row with 3 left"):
        Row(3).add(document(4))
    with pytest.raises(ValueError, match="limit 0"):
        split_document(document(1), 0)
