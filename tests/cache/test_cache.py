"""Rows take, share and return pages: in any order the bits are the same, and nobody sees what another wrote."""

import copy
import gc
import os
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv4.analysis.kv import cache_bytes
from dsv4.cache import Cache, OutOfPagesError
from dsv4.cache.native import StaleCacheError
from dsv4.config import PAGE_TOKENS, ModelConfig
from dsv4.kernels import backends
from dsv4.model.batch import RaggedBatch
from dsv4.model.transformer import Transformer

from ..model.tiny import random_ids, random_model, tiny_config

CONFIG = tiny_config(schedule=(0, 4, 128, 4), index_topk=16)
PATHS = ["reference", *(["native"] if backends.native_module() is not None else [])]
NEEDS_NATIVE = pytest.mark.skipif(backends.native_module() is None, reason="the native kernels are not built")
STRICT_MKL = torch.backends.mkl.is_available() and os.environ.get("MKL_CBWR", "").endswith("STRICT")
LENGTH = 420
CPU = torch.device("cpu")


@pytest.fixture(params=PATHS)
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Transformer]:
    if request.param == "reference":
        monkeypatch.setattr(backends, "native_module", lambda: None)
    with torch.no_grad():
        yield random_model(CONFIG)


@pytest.fixture
def ids() -> list[int]:
    return random_ids(CONFIG, LENGTH).tolist()


def same(got: Tensor, want: Tensor) -> bool:
    """To the bit where batches of other sizes give the same bits: see test_chunking.py."""
    if backends.native_module() is not None or STRICT_MKL:
        return torch.equal(got, want)
    return torch.allclose(got, want, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def feed(model: Transformer, cache: Cache, parts: dict[int, list[int]]) -> list[Tensor]:
    """Logits of the next tokens of some rows, in one ragged batch; one tensor per row."""
    batch = RaggedBatch.pack(list(parts.values()), [cache.lengths[s] for s in parts], list(parts))
    return list(model.next_token_logits(batch, cache).split([len(part) for part in parts.values()]))


def small_cache(rows: int = 2, tokens: int = 512, pages: int | None = None) -> Cache:
    return Cache(CONFIG, rows, tokens, CPU, torch.float32, max_pages=pages)


def poison(cache: Cache, pages: list[int]) -> None:
    """Entries in pages that nobody holds any more are NaN."""
    for layer in cache.layers:
        for c in layer.compressors():
            for page in pages:
                c.entries[page * c.entries_per_page : (page + 1) * c.entries_per_page] = float("nan")
    if cache.native is not None:
        cache.native.forget(pages)


def is_sound(cache: Cache, outside: list[int] | None = None) -> bool:
    """Every page has as many references as holders, and every row the pages of its tokens."""
    held = [page for slot in range(cache.batch_size) for page in cache.pages_of(slot)] + (outside or [])
    rows_fit = all(
        (cache.block_table[slot] >= 0).sum() == -(-cache.lengths[slot] // PAGE_TOKENS)
        for slot in range(cache.batch_size)
    )
    return rows_fit and [cache.pool.references(p) for p in range(cache.max_pages)] == [
        held.count(p) for p in range(cache.max_pages)
    ]


@pytest.mark.parametrize("order", [[7, 6, 5, 4, 3, 2, 1, 0], [3, 0, 6, 1, 7, 2, 5, 4]])
def test_any_page_order_gives_the_same_bits(model: Transformer, ids: list[int], order: list[int]) -> None:
    """Pages in turns as the tokens come, and in orders of no sense, from a pool that held NaN."""
    plain, mixed = small_cache(), small_cache()
    assert [mixed.pool.take() for _ in order] == sorted(order)
    for page in reversed(order):  # the one that was released last is handed out first
        mixed.pool.release([page])
    poison(mixed, order)
    for at in range(0, LENGTH, 70):
        step = {0: ids[at : at + 70], 1: ids[::-1][at : at + 70]}
        for got, want in zip(feed(model, mixed, step), feed(model, plain, step), strict=True):
            assert torch.equal(got, want)
    assert plain.pages_of(0) == [0, 2, 4, 6] and mixed.pages_of(0) == order[::2] and mixed.pages_of(1) == order[1::2]


def test_rows_share_pages_and_write_to_their_own(model: Transformer, ids: list[int]) -> None:
    """Two rows go on from the first 200 tokens of a third, which goes on too, and end one after the other."""
    other = ids[::-1]
    cache, alone = small_cache(3, pages=9), small_cache(2)
    feed(model, cache, {0: ids[:200]})
    state = cache.snapshot(0)
    feed(model, cache, {0: ids[200:260]})
    for slot in (1, 2):
        cache.share(0, slot, 200)
        cache.restore(slot, state)
    assert cache.pages_of(1) == cache.pages_of(2) == cache.pages_of(0)[:2] and cache.pool.num_used == 3
    want = feed(model, alone, {0: ids[:300], 1: ids[:200] + other[:100]})
    got = feed(model, cache, {0: ids[260:300], 1: other[:100], 2: ids[200:290]})
    assert same(got[0], want[0][260:])
    assert same(got[1], want[1][200:])
    assert same(got[2], want[0][200:290])
    assert cache.pages_of(1)[0] == cache.pages_of(0)[0] and cache.pages_of(1)[1] != cache.pages_of(2)[1]
    assert is_sound(cache) and cache.pool.references(cache.pages_of(0)[0]) == 3
    own = cache.pages_of(0)[1:]
    cache.reset(0)
    poison(cache, own[1:])
    cache.reset(1)
    assert is_sound(cache) and cache.lengths == [0, 0, 290]
    assert same(feed(model, cache, {2: ids[290:300]})[0], want[0][290:])


def test_a_page_kept_from_outside_outlives_its_row(model: Transformer, ids: list[int]) -> None:
    """As a store of prefixes does it: pages and state are kept, the row ends, another row starts from them."""
    cache, alone = small_cache(2, pages=6), small_cache(1)
    (want,) = feed(model, alone, {0: ids})
    feed(model, cache, {0: ids[:256]})
    pages, state = cache.pages_of(0), cache.snapshot(0)
    cache.pool.retain(pages)
    cache.reset(0)
    feed(model, cache, {0: ids[:300][::-1]})
    assert is_sound(cache, pages) and cache.num_free_pages == 1
    cache.reset(0)
    cache.attach(1, pages)
    cache.pool.release(pages)
    cache.restore(1, state)
    assert same(feed(model, cache, {1: ids[256:]})[0], want[256:])
    assert is_sound(cache)


def test_going_back_returns_pages(model: Transformer, ids: list[int]) -> None:
    cache, alone = small_cache(1), small_cache(1)
    (want,) = feed(model, alone, {0: ids})
    feed(model, cache, {0: ids[:130]})
    state = cache.snapshot(0)
    feed(model, cache, {0: ids[300:420] + ids[:200]})
    cache.restore(0, state)
    assert cache.pool.num_used == 2 and is_sound(cache)
    assert same(feed(model, cache, {0: ids[130:]})[0], want[130:])


def test_a_batch_for_which_pages_are_missing_changes_nothing() -> None:
    cache = small_cache(3, pages=4)

    def reserve(slots: list[int], starts: list[int], lengths: list[int]) -> None:
        cache.reserve(np.array(slots), np.array(starts), np.array(lengths))

    reserve([0], [0], [200])
    cache.advance(np.array([0]), np.array([200]))
    assert (cache.num_free_pages, cache.pages_needed([0], [56]), cache.pages_needed([0], [57])) == (2, 0, 1)
    table = cache.block_table.copy()
    with pytest.raises(OutOfPagesError, match="the batch needs 3 more pages, 2 are free"):
        reserve([0, 1], [200, 0], [100, 200])
    assert (cache.block_table == table).all() and is_sound(cache)
    cache.share(0, 1, 200)
    cache.restore(1, cache.snapshot(0))
    assert cache.pages_needed([1], [0]) == 0 and cache.pages_needed([1], [1]) == 1, (
        "a copy of the page that both have begun"
    )
    reserve([0, 1], [200, 200], [56, 56])
    assert cache.pages_of(0)[1] != cache.pages_of(1)[1] and cache.pages_of(0)[0] == cache.pages_of(1)[0]


def test_a_row_that_shares_pages_without_a_state_writes_to_copies(model: Transformer, ids: list[int]) -> None:
    """Every page that a row writes to, whole ones before the last and those beyond its length too."""
    cache, alone = small_cache(2), small_cache(2)
    want = feed(model, alone, {0: ids[:310], 1: ids[:310][::-1]})
    feed(model, cache, {0: ids[:300]})
    cache.share(0, 1, 300)
    got = feed(model, cache, {1: ids[:310][::-1]})
    assert same(got[0], want[1]) and is_sound(cache) and cache.pool.num_shares == 0
    assert same(feed(model, cache, {0: ids[300:310]})[0], want[0][300:])


def test_the_last_holder_of_a_page_that_all_write_to_keeps_it(model: Transformer, ids: list[int]) -> None:
    cache, alone = small_cache(3, pages=5), small_cache(3)
    parts = {0: ids[:300] + ids[:5], 1: ids[:300] + ids[5:10], 2: ids[:300] + ids[10:15]}
    want = feed(model, alone, parts)
    feed(model, cache, {0: ids[:300]})
    state = cache.snapshot(0)
    for slot in (1, 2):
        cache.share(0, slot, 300)
        cache.restore(slot, state)
    last = cache.pages_of(0)[2]
    assert cache.num_free_pages == 2 and cache.pages_needed([0, 1, 2], [5, 5, 5]) == 2
    assert [cache.pages_needed([slot], [5]) for slot in range(3)] == [1, 1, 1]
    got = feed(model, cache, {slot: part[300:] for slot, part in parts.items()})
    assert all(same(g, w[300:]) for g, w in zip(got, want, strict=True))
    assert cache.pages_of(2)[2] == last and cache.num_free_pages == 0 and is_sound(cache)


def test_a_holder_outside_keeps_the_page_that_all_rows_write_to() -> None:
    cache = small_cache(2, pages=3)
    slots, lengths = np.array([0, 1]), np.array([5, 5])
    cache.reserve(slots[:1], np.array([0]), lengths[:1])
    cache.advance(slots[:1], lengths[:1])
    pages = cache.pages_of(0)
    cache.pool.retain(pages)
    cache.share(0, 1, 5)
    cache.restore(1, cache.snapshot(0))
    cache.reserve(slots, lengths, lengths)
    assert cache.num_free_pages == 0 and is_sound(cache, pages) and cache.pool.references(pages[0]) == 1


def test_sharing_is_refused_where_it_would_lose_something() -> None:
    cache = small_cache(2)
    cache.reserve(np.array([0]), np.array([0]), np.array([5]))
    cache.advance(np.array([0]), np.array([5]))
    with pytest.raises(ValueError, match="cache row 0 holds 5 tokens and cannot share 6"):
        cache.share(0, 1, 6)
    cache.share(0, 1, 5)
    with pytest.raises(ValueError, match="cache row 1 is not empty: reset it before it shares pages"):
        cache.share(0, 1, 5)
    with pytest.raises(ValueError, match="page 3 is not in use"):
        small_cache(1).attach(0, [3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_formula(dtype: torch.dtype) -> None:
    """The formula counts main layers in BF16; a cache has the MTP blocks' windows and a blank row per pool too."""
    config = ModelConfig.preset("nano")
    cache, tokens = Cache(config, 1, 1024, CPU, dtype), 1024
    formula, wide = cache_bytes(config, tokens, "bf16"), dtype.itemsize // 2
    size = cache.num_bytes()
    blank = [[c.entries.shape[1] * dtype.itemsize for c in layer.compressors()] for layer in cache.layers]
    assert size["entries"] == wide * formula.entries + sum(widths[0] for widths in blank if widths)
    assert size["index_keys"] == wide * formula.index_keys + sum(widths[1] for widths in blank if len(widths) > 1)
    assert size["state"] == formula.states
    main = config.num_hidden_layers
    assert size["window"] * main == wide * formula.windows * (main + config.num_nextn_predict_layers)
    assert cache.page_bytes * cache.num_pages == wide * formula.growing
    assert sum(size.values()) == sum(t.nbytes for layer in cache.layers for t in layer.tensors())


# Index keys that the native kernels keep quantized


def quantized(cache: Cache) -> int:
    assert cache.native is not None
    return cache.native.quantized_rows


@NEEDS_NATIVE
@torch.no_grad()
def test_a_neighbour_that_ends_drops_nobodys_kept_keys(ids: list[int]) -> None:
    """A step quantizes the panel that its token's entry fell into, whatever rows beside it did."""
    module = backends.native_module()
    assert module is not None
    if "avx512_vnni" not in module.isas():
        pytest.skip("no instruction set of this machine keeps keys")
    model, cache = random_model(CONFIG), small_cache(4)
    feed(model, cache, {0: ids[:400], 1: ids[:200], 2: ids[:60]})
    state = cache.snapshot(1)
    feed(model, cache, {0: ids[400:401], 1: ids[200:201]})

    def step(token: int) -> int:
        before = quantized(cache)
        feed(model, cache, {0: [token]})
        return quantized(cache) - before

    index_layers = 2
    assert 0 <= step(ids[401]) <= 16 * index_layers
    for change in (
        lambda: cache.reset(2),
        lambda: cache.restore(1, state),
        lambda: cache.share(1, 3, 200),
        lambda: cache.restore(3, state),
        lambda: feed(model, cache, {3: ids[200:210]}),  # copies the page that it shares
        lambda: cache.reset(3),
        lambda: cache.snapshot(0),
    ):
        change()
        assert step(ids[402]) <= 16 * index_layers
    cache.changed(0)
    assert step(ids[403]) >= 100 * index_layers, "of a row that was written from outside all keys are"


@NEEDS_NATIVE
@torch.no_grad()
def test_writes_that_the_cache_is_not_told_of_are_an_error_where_it_is_checked(
    ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = backends.native_module()
    assert module is not None
    if "avx512_vnni" not in module.isas():
        pytest.skip("no instruction set of this machine keeps keys")
    model, cache = random_model(CONFIG), small_cache()
    feed(model, cache, {0: ids[:300], 1: ids[:300]})
    feed(model, cache, {0: ids[300:301], 1: ids[300:301]})
    keys = cache.layers[3].index
    assert keys is not None
    keys.entries[cache.entry_rows(1, 4, 40, 41)] += 1
    with pytest.raises(StaleCacheError, match=rf"index keys of layer 3, page {cache.pages_of(1)[1]}, were written"):
        feed(model, cache, {0: ids[301:302]})
    cache.changed(1)
    feed(model, cache, {0: ids[301:302]})
    keys.entries = keys.entries.clone()
    with pytest.raises(StaleCacheError, match="another tensor lies in the place of one of the cache's"):
        feed(model, cache, {0: ids[302:303]})
    monkeypatch.setenv("DSV4_CHECK", "0")
    unchecked = small_cache()
    feed(model, unchecked, {0: ids[:300]})
    feed(model, unchecked, {0: ids[300:301]})
    index = unchecked.layers[3].index
    assert index is not None
    index.entries += 1
    feed(model, unchecked, {0: ids[301:302]})


@NEEDS_NATIVE
@torch.no_grad()
def test_what_the_reference_writes_is_seen_by_the_kernels(ids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Both compute on one cache in turns, as a forward with auxiliary losses does."""
    model, cache = random_model(CONFIG), small_cache(1)
    feed(model, cache, {0: ids[:250]})
    feed(model, cache, {0: ids[250:251]})
    state = cache.snapshot(0)
    feed(model, cache, {0: ids[300:340]})
    feed(model, cache, {0: ids[340:341]})
    cache.restore(0, state)
    with monkeypatch.context() as patch:
        patch.setattr(backends, "native_module", lambda: None)
        feed(random_model(CONFIG), cache, {0: ids[251:300]})
    got = feed(model, cache, {0: ids[300:301]})
    (want,) = feed(model, small_cache(1), {0: ids[:301]})
    assert torch.allclose(got[0][0], want[300], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_memory_of_a_dropped_cache_waits_for_no_garbage_collector(model: Transformer, ids: list[int]) -> None:
    cache = small_cache()
    feed(model, cache, {0: ids[:300]})
    tensors = [weakref.ref(tensor) for layer in cache.layers for tensor in layer.tensors()]
    gc.disable()
    try:
        del cache
        assert not any(tensor() is not None for tensor in tensors)
    finally:
        gc.enable()


@torch.no_grad()
def test_a_copy_of_a_cache_goes_its_own_way(model: Transformer, ids: list[int]) -> None:
    cache = small_cache()
    feed(model, cache, {1: ids[:100]})
    with torch.inference_mode():
        again = copy.deepcopy(cache)
    (want,) = feed(model, cache, {1: ids[100:300]})
    feed(model, cache, {0: ids[:300][::-1]})
    with torch.inference_mode():
        assert torch.equal(feed(model, again, {1: ids[100:300]})[0], want)
    assert is_sound(cache) and is_sound(again)
