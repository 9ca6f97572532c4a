from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4.data.packing import Document, Slot, pack_evenly, rows_needed, split_document


def document(length: int, start: int = 0) -> Document:
    return Document(tuple(range(start, start + length)), tuple(i % 2 for i in range(length)))


def test_long_documents_are_cut_and_bad_ones_refused() -> None:
    pieces = split_document(document(10), 4)
    assert [len(p) for p in pieces] == [4, 4, 2]
    assert sum((p.ids for p in pieces), ()) == document(10).ids
    with pytest.raises(ValueError, match="one mask value per id"):
        Document((1, 2), (1,))
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


Kinds = dict[str, tuple[int, int]]  # shortest and longest piece


def draw(kinds: Kinds, tokens: int, seed: int = 5) -> tuple[list[int], list[str]]:
    """Lengths and kinds of pieces that have `tokens` tokens or some more, in equal shares, as they might arrive."""
    random, found = Random(seed), dict.fromkeys(kinds, 0)
    pieces: list[tuple[int, str]] = []
    while sum(found.values()) < tokens:
        kind = min(found, key=lambda kind: found[kind])
        pieces.append((random.randint(*kinds[kind]), kind))
        found[kind] += pieces[-1][0]
    random.shuffle(pieces)
    return [length for length, _ in pieces], [kind for _, kind in pieces]


def shares(row: list[Slot], kinds: list[str], kind: str) -> float:
    return sum(len(slot) for slot in row if kinds[slot.piece] == kind) / sum(map(len, row))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("parted", [False, True])
def test_rows_hold_pieces_of_all_kinds(seed: int, parted: bool) -> None:
    """A row is a step of many runs: by length alone it would hold texts, or chats, or tasks.

    `parted`: kind after kind, as those of a mixture come.
    """
    lengths, kinds = draw({"text": (700, 1024), "chat": (100, 400), "task": (30, 90)}, 127 * 4096 - 2048, seed)
    if parted:
        order = sorted(range(len(kinds)), key=lambda piece: kinds[piece])
        lengths, kinds = [lengths[piece] for piece in order], [kinds[piece] for piece in order]
    packed = pack_evenly(lengths, 128, 4096, 128)
    assert all(slot.stop == lengths[slot.piece] and not slot.start for row in packed for slot in row)
    used = sorted(sum(map(len, row)) for row in packed)
    assert used[1] > 0.9 * 4096 and sum(used) > 0.985 * 128 * 4096
    for kind in ("text", "chat", "task"):
        found = [shares(row, kinds, kind) for row in packed]
        assert min(found) > 0.1 and max(found) < 0.6, kind


def test_pieces_that_come_in_another_order_share_rows_with_others() -> None:
    """In each epoch of a small corpus: all its pieces are in every epoch."""
    random = Random(2)
    lengths = [random.randint(50, 400) for _ in range(200)]
    pairs: list[set[tuple[int, int]]] = []
    for seed in range(2):
        order = list(range(200))
        Random(seed).shuffle(order)
        packed = pack_evenly([lengths[n] for n in order], -(-sum(lengths) // 4000), 4096)
        rows = [sorted(order[slot.piece] for slot in row) for row in packed]
        pairs.append({(a, b) for row in rows for a in row for b in row if a < b})
    assert len(pairs[0] & pairs[1]) < 0.3 * len(pairs[0])


def test_copies_are_in_different_rows() -> None:
    names = [n % 40 for n in range(160)] + [None] * 400
    lengths = [60 + n % 40 for n in range(160)] + [20 + n % 7 for n in range(400)]
    for seed in range(3):
        order = list(range(len(names)))
        Random(seed).shuffle(order)
        rows = -(-sum(lengths) // 1000)
        packed = pack_evenly([lengths[n] for n in order], rows, 1024, names=[names[n] for n in order])
        for row in packed:
            found = [name for slot in row if (name := names[order[slot.piece]]) is not None]
            assert len(found) == len(set(found))
    assert [len(row) for row in pack_evenly([10] * 6, 3, 20, names=["a"] * 6)] == [2, 2, 2]  # no other way


@settings(deadline=None)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=80), st.integers(0, 20), st.integers(0, 30))
def test_pieces_that_may_not_be_cut_fit_into_the_rows_they_need(lengths: list[int], capacity: int, others: int) -> None:
    capacity += max(lengths)
    rows = rows_needed(lengths, capacity)
    assert rows <= len(lengths)
    others = min(others, rows * capacity - sum(lengths), capacity)
    packed = pack_evenly(
        [*lengths, *[others] * bool(others)],
        rows,
        capacity,
        1,
        ["same"] * (len(lengths) + bool(others)),
        range(len(lengths)),
    )
    slots = [slot for row in packed for slot in row]
    assert sorted((slot.piece, slot.start, slot.stop) for slot in slots if slot.piece < len(lengths)) == [
        (piece, 0, length) for piece, length in enumerate(lengths)
    ]
    assert sum(map(len, slots)) == sum(lengths) + others and all(0 < sum(map(len, row)) <= capacity for row in packed)


def test_too_few_rows_for_what_may_not_be_cut_are_named() -> None:
    assert rows_needed([2100] * 5, 4096) == 5
    with pytest.raises(ValueError, match="5 pieces that may not be cut need more than 3 rows of 4096"):
        pack_evenly([2100] * 5, 3, 4096, whole=range(5))
