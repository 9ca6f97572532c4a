"""Pages are handed out once, shared by count, and free again after their last holder."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4.cache.pages import BlockTable, OutOfPagesError, PagePool


def test_a_page_is_free_again_after_its_last_holder() -> None:
    pool = PagePool(3)
    first, second = pool.take(), pool.take()
    pool.retain([first])
    pool.release([first, second])
    assert (pool.references(first), pool.references(second)) == (1, 0)
    assert (pool.num_used, pool.num_free) == (1, 2)
    assert pool.take() == second, "used pages before pages that were never used"
    pool.release([first])
    assert (pool.take(), pool.take()) == (first, 2)
    with pytest.raises(OutOfPagesError, match="all 3 pages of the cache are in use"):
        pool.take()


@pytest.mark.parametrize("pages", [[0, 5], [0, 1], [-1]])
def test_pages_that_are_not_in_use_are_neither_shared_nor_released(pages: list[int]) -> None:
    pool = PagePool(6)
    pool.take(), pool.take()
    pool.release([1])
    for change in (pool.retain, pool.release):
        with pytest.raises(ValueError, match=f"page {pages[-1]} is not in use"):
            change(pages)
    assert pool.references(0) == 1, "nothing of a refused list is changed"


def test_a_page_is_released_at_most_as_often_as_it_is_held() -> None:
    pool = PagePool(3)
    first, second = pool.take(), pool.take()
    pool.retain([second, second])
    with pytest.raises(ValueError, match="page 0 is held 1 times and cannot be released 2"):
        pool.release([second, first, first])
    assert (pool.references(first), pool.references(second), pool.num_shares, pool.num_free) == (1, 3, 2, 1)
    pool.release([second, first, second, second])
    assert (pool.num_used, pool.num_shares) == (0, 0) and {pool.take(), pool.take(), pool.take()} == {0, 1, 2}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["take", "retain", "release"]), st.integers(0, 100)), max_size=60))
def test_counts_are_those_of_the_holders(steps: list[tuple[str, int]]) -> None:
    pool = PagePool(5)
    held: list[int] = []
    for action, number in steps:
        if action == "take" and len(set(held)) < 5:
            page = pool.take()
            assert page not in held
            held.append(page)
        elif held:
            page = held[number % len(held)]
            if action == "retain":
                pool.retain([page])
                held.append(page)
            elif action == "release":
                pool.release([page])
                held.remove(page)
        assert [pool.references(page) for page in range(5)] == [held.count(page) for page in range(5)]
        assert pool.num_free == 5 - len(set(held)) and pool.num_shares == len(held) - len(set(held))


def test_block_table() -> None:
    blocks = BlockTable(2, 4)
    address = blocks.table.ctypes.data
    blocks.append(1, [7, 2])
    blocks.append(1, [5])
    assert blocks.pages(1) == [7, 2, 5] and blocks.pages(1, 2) == [7, 2] and blocks.counts[0] == 0
    assert blocks.entry_rows(1, np.array([0, 31, 32, 64]), 4).tolist() == [7 * 32, 7 * 32 + 31, 2 * 32, 5 * 32]
    assert blocks.entry_rows(np.array([1, 1]), np.array([2, 0]), 128).tolist() == [5, 7]
    assert blocks.replace(1, 1, 3) == 2
    assert blocks.cut(1, 1) == [3, 5] and blocks.table.tolist() == [[-1] * 4, [7, -1, -1, -1]]
    assert blocks.cut(1, 3) == [] and blocks.counts[1] == 1
    assert blocks.table.ctypes.data == address, "kernels keep the address"
