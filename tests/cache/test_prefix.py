"""Stored prefixes: which one is found, which pages and bytes they hold, and in which order they leave."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dsv4.analysis.kv import cache_bytes
from dsv4.cache import Cache, OutOfPagesError, PrefixCache
from dsv4.config import PAGE_TOKENS, ModelConfig

from ..model.tiny import random_ids, tiny_config

CPU = torch.device("cpu")
CONFIG = tiny_config(schedule=(0, 4, 128))
IDS: list[int] = random_ids(CONFIG, 700).tolist()


def of(ids: list[int]):
    return lambda start, stop: ids[start:stop]


class Store:
    """A cache of two rows of which row 0 is filled, stored and emptied; its entries are of no matter here."""

    def __init__(self, max_bytes: int = 1 << 40, pages: int = 20) -> None:
        self.cache = Cache(CONFIG, 2, 1024, CPU, torch.float32, max_pages=pages)
        self.prefixes = PrefixCache(self.cache, max_bytes)

    def fill(self, count: int, slot: int = 0) -> None:
        held = self.cache.lengths[slot]
        place = np.array([slot])
        self.cache.reserve(place, np.array([held]), np.array([count - held]))
        self.cache.advance(place, np.array([count - held]))

    def put(self, ids: list[int], *lengths: int, salt: str | None = None) -> None:
        """Store the first `lengths` tokens of a sequence, ascending, as its row grows."""
        for length in lengths:
            self.fill(length)
            self.prefixes.store(0, of(ids), salt)
        self.cache.reset(0)

    def find(self, ids: list[int], salt: str | None = None) -> tuple[int, int]:
        match = self.prefixes.find(of(ids), len(ids), salt)
        return match.length, match.common

    def references(self) -> int:
        return self.cache.pool.num_used + self.cache.pool.num_shares


@pytest.mark.parametrize("length", [1, 127, 128, 129, 255, 256, 300])
def test_the_longest_prefix_is_found_and_nothing_longer(length: int) -> None:
    store = Store()
    store.put(IDS, *{min(length, 100), length})
    for asked in (length, length + 1, length + 200):
        assert store.find(IDS[:asked])[0] == length
    for place in (0, length // 2, length - 1):
        other = [*IDS[:place], IDS[place] + 1, *IDS[place + 1 : 400]]
        assert store.find(other)[0] == (100 if place >= 100 and length > 100 else 0), "a token differs"
    assert store.find(IDS[: length - 1])[0] == (100 if length > 100 else 0)


def test_common_is_the_last_block_boundary_of_both() -> None:
    store = Store()
    store.put(IDS, 600)
    assert store.find(IDS[:300] + IDS[::-1]) == (0, 256)
    assert store.find(IDS[:100] + IDS[::-1]) == (0, 0)
    store.put(IDS, 256)
    assert store.find(IDS[:300] + IDS[::-1]) == (256, 256)
    assert store.find(IDS[:256]) == (256, 256)


def test_salts_share_nothing() -> None:
    store = Store()
    store.put(IDS, 200, salt="a")
    assert store.find(IDS) == store.find(IDS, "b") == (0, 0) and store.find(IDS, "a") == (200, 128)
    store.put(IDS, 200)
    assert store.prefixes.num_pages == 4, "pages of their own"
    store.prefixes.clear()
    assert not store.prefixes._roots


def test_prefixes_share_the_pages_of_whole_blocks() -> None:
    store = Store()
    store.put(IDS, 300, 301, 400)
    assert store.prefixes.num_pages == 2 + 1 + 1 + 1 + 1  # blocks 0 and 1, tails of 300 and 301, block 2, tail of 400
    store.put(IDS[:256] + IDS[::-1], 300)
    assert store.prefixes.num_pages == 7 and store.cache.pool.num_used == 7
    store.put(IDS, 300)
    assert len(store.prefixes) == 4 and store.prefixes.num_pages == 7, "what is there is not stored twice"


def test_bytes_are_those_of_the_formula() -> None:
    """Whole pages and the states of main layers, as `dsv4 inspect` counts them, and the windows of the MTP block."""
    config = ModelConfig.preset("nano")
    cache = Cache(config, 1, 1024, CPU, torch.float32)
    prefixes = PrefixCache(cache, 1 << 40)
    for length in (300, 512):
        held = cache.lengths[0]
        cache.reserve(np.array([0]), np.array([held]), np.array([length - held]))
        cache.advance(np.array([0]), np.array([length - held]))
        prefixes.store(0, of([5] * 600))
    formula = cache_bytes(config, 5 * PAGE_TOKENS, "bf16")  # four blocks and the tail of 300
    layers = config.num_hidden_layers
    windows = 2 * formula.windows * (layers + config.num_nextn_predict_layers) // layers
    assert prefixes.num_bytes == 2 * formula.growing + 2 * (windows + formula.states)
    assert prefixes.snapshot_bytes == sum(2 * [cache.snapshot(0).num_bytes])
    prefixes.clear()
    assert prefixes.num_bytes == 0 and prefixes.num_pages == 0


def test_the_prefix_used_longest_ago_leaves_first_and_frees_what_it_alone_needs() -> None:
    store = Store()
    others = [[place, *IDS] for place in range(3)]
    for ids in others:
        store.put(ids, 200)
    entry = store.prefixes.find(of(others[0]), 200).entry
    assert entry is not None
    store.prefixes.take(1, entry)
    store.prefixes.let_go(entry)
    store.cache.reset(1)
    store.prefixes.max_bytes = store.prefixes.num_bytes
    store.put([9, *IDS], 200)
    assert [store.find(ids)[0] for ids in others] == [200, 0, 200]
    assert store.references() == store.prefixes.num_pages == 6
    store.prefixes.max_bytes = 0
    store.put([8, *IDS], 200)
    assert len(store.prefixes) == 0 and store.references() == 0


def test_prefixes_of_running_rows_leave_last() -> None:
    store = Store(pages=6)
    held, free = [1, *IDS], [2, *IDS]
    store.put(held, 200)
    store.put(free, 200)
    entry = store.prefixes.find(of(held), 200).entry
    assert entry is not None
    store.prefixes.take(1, entry)
    pages = store.cache.pages_of(1)
    assert store.prefixes.evict_until(lambda: store.cache.num_free_pages >= 4)
    assert (store.find(held)[0], store.find(free)[0]) == (200, 0)
    store.prefixes.max_bytes = 0
    store.put(free, 200)
    assert store.find(held)[0] == 200, "a budget does not take it from a row"
    assert not store.prefixes.evict_until(lambda: store.cache.num_free_pages >= 5)
    assert len(store.prefixes) == 0 and store.cache.pages_of(1) == pages and store.cache.pool.num_used == 2
    store.prefixes.let_go(entry)


def test_a_saved_row_comes_back_in_another_row_and_other_pages() -> None:
    store = Store(pages=8)
    store.fill(300)
    for layer in store.cache.layers:
        for tensor in layer.tensors():
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)))
    want = store.cache.save(0)
    store.cache.reset(0)
    taken = [store.cache.pool.take() for _ in range(6)]
    with pytest.raises(OutOfPagesError, match="a saved row needs 3 more pages, 2 are free"):
        store.cache.load(1, want)
    store.cache.pool.release(taken[1:])
    store.cache.load(1, want)
    got = store.cache.save(1)
    assert got.snapshot.length == 300 and store.cache.pool.num_used == 4
    assert all(torch.equal(a, b) for a, b in zip(got.entries, want.entries, strict=True))
    assert all(torch.equal(t, want.snapshot.fields()[name]) for name, t in got.snapshot.fields().items())
