from random import Random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsv4.data.packing import Document, Row, best_fit, pack, pack_evenly, split_document


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


@settings(deadline=None)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=80), st.integers(1, 9), st.sampled_from([1, 4, 16]))
def test_even_packing_places_every_token_once(lengths: list[int], rows: int, alignment: int) -> None:
    capacity = max(max(lengths), -(-sum(lengths) // rows))
    if sum(lengths) < rows:
        with pytest.raises(ValueError, match=f"{sum(lengths)} tokens .* for {rows} rows"):
            pack_evenly(lengths, rows, capacity, alignment)
        return
    packed = pack_evenly(lengths, rows, capacity, alignment)
    assert all(0 < sum(map(len, row)) <= capacity for row in packed)
    covered = sorted((slot.piece, token) for row in packed for slot in row for token in range(slot.start, slot.stop))
    assert covered == [(piece, token) for piece, length in enumerate(lengths) for token in range(length)]


def test_even_packing_cuts_few_pieces_and_those_at_windows() -> None:
    random = Random(5)
    lengths: list[int] = []
    while sum(lengths) < 127 * 4096:
        lengths.append(min(4096, int(random.lognormvariate(6.5, 1.0)) + 2))
    lengths[-1] -= sum(lengths) - 127 * 4096
    packed = pack_evenly(lengths, 128, 4096, 128)
    slots = [slot for row in packed for slot in row]
    cut = [slot for slot in slots if len(slot) < lengths[slot.piece]]
    assert not cut
    used = sorted(sum(map(len, row)) for row in packed)
    assert used[1] > 0.95 * 4096
    tight = pack_evenly([4000] * 9 + [900], 10, 3990 + 128, 128)
    assert {slot.start % 128 for row in tight for slot in row} == {0}
    with pytest.raises(ValueError, match="at most the room"):
        pack_evenly([5000], 2, 4096)
