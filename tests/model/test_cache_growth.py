"""A cache that grows with its tokens, as on a GPU, gives the logits of a full-size one. Forced on the CPU here."""

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv4.cache import Cache
from dsv4.cache import cache as cache_module
from dsv4.kernels import backends
from dsv4.model.batch import RaggedBatch
from dsv4.model.transformer import Transformer

from .tiny import deviation, random_ids, random_model, tiny_config

CONFIG = tiny_config(schedule=(0, 4, 128), index_topk=16)


@pytest.fixture(autouse=True)
def plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "native_module", lambda: None)


def caches(model: Transformer, rows: int, tokens: int) -> tuple[Cache, Cache]:
    make = (model.config, rows, tokens, model.device, model.dtype)
    return Cache(*make), Cache(*make, grows=True)


@torch.inference_mode()
def logits(model: Transformer, cache: Cache, parts: dict[int, list[int]]) -> Tensor:
    """Logits of the next tokens of some rows, in one ragged batch."""
    slots = list(parts)
    batch = RaggedBatch.pack(list(parts.values()), starts=[cache.lengths[s] for s in slots], slots=slots)
    return model.next_token_logits(batch, cache)


def steps(count: int = 3) -> list[dict[int, list[int] | None]]:
    """Three rows in turns and together, prompts and single tokens, rows emptied (None) and reused."""
    ids = random_ids(CONFIG, 4000, seed=5).tolist()
    sizes: list[dict[int, int | None]] = [
        {0: 130},
        {0: 1, 1: 700},
        {2: 5, 0: 400, 1: 1},
        {1: None},
        {2: 300, 0: 1},
        {1: 140, 2: 1},
        {0: None},
        {0: 20, 1: 500, 2: 3},
        {0: 1, 1: 1, 2: 1},
    ]
    return [{s: None if n is None else [ids.pop() for _ in range(n)] for s, n in step.items()} for step in sizes]


@pytest.mark.parametrize("unit", [1, 2, cache_module.GROWTH_PAGES])
def test_a_growing_cache_gives_the_logits_of_a_full_one(monkeypatch: pytest.MonkeyPatch, unit: int) -> None:
    monkeypatch.setattr(cache_module, "GROWTH_PAGES", unit)
    model = random_model(CONFIG)
    full, growing = caches(model, 3, 8192)
    for step in steps():
        if None in step.values():
            for cache in (full, growing):
                cache.reset(next(iter(step)))
            continue
        want, got = logits(model, full, step), logits(model, growing, step)  # type: ignore[arg-type]
        assert torch.equal(got, want)
    assert growing.lengths == full.lengths


def test_bits_over_several_growths_at_the_real_unit() -> None:
    """17,001 tokens in two rows: the cache grows to 8,192 tokens, then 16,384, then its maximum."""
    model = random_model(tiny_config(schedule=(4, 128), index_topk=16))
    full, growing = caches(model, 2, 17_000)
    ids = random_ids(model.config, 17_000).tolist()
    seen = set()
    for start in range(0, 17_000, 2000):
        parts = {0: ids[start : start + 2000], 1: ids[start // 2000 : start // 2000 + 1]}
        assert torch.equal(logits(model, growing, parts), logits(model, full, parts))
        seen.add(growing.num_pages)
    assert sorted(seen) == [64, 128, 256]


def test_memory_comes_with_the_tokens() -> None:
    model = random_model(CONFIG)
    full, growing = caches(model, 4, 1 << 20)
    entries, blank = full.num_bytes()["entries"], caches(model, 1, 1)[1].num_bytes()["entries"]
    assert growing.num_bytes()["entries"] == blank < entries / 1000
    logits(model, growing, {2: random_ids(CONFIG, 300).tolist()})
    one_unit = growing.num_bytes()["entries"] - blank
    assert one_unit == (entries - blank) // (4 * 8192 // cache_module.GROWTH_PAGES)
    growing.reset(2)
    logits(model, growing, {0: random_ids(CONFIG, 300).tolist()})
    assert growing.num_bytes()["entries"] - blank == one_unit, "the pages of a row that ended are used again"


def test_a_snapshot_outlives_a_growth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "GROWTH_PAGES", 1)
    model = random_model(CONFIG)
    _, growing = caches(model, 2, 4096)
    ids = random_ids(CONFIG, 700).tolist()
    logits(model, growing, {1: ids[:126]})
    snapshot = growing.snapshot(1)
    wanted = logits(model, growing, {1: ids[126:300]})
    growing.restore(1, snapshot)
    logits(model, growing, {1: ids[300:700]})
    logits(model, growing, {0: ids[:400]})
    growing.restore(1, snapshot)
    assert torch.equal(logits(model, growing, {1: ids[126:300]}), wanted)


def test_no_row_sees_another_rows_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Non-finite entries in a neighboring row: even multiplied by zero they would show."""
    monkeypatch.setattr(cache_module, "GROWTH_PAGES", 1)
    model = random_model(CONFIG)
    full, growing = caches(model, 2, 4096)
    ids = random_ids(CONFIG, 600).tolist()
    for cache in (full, growing):
        logits(model, cache, {0: ids[:300]})
        logits(model, cache, {1: ids[:300]})
        for layer in cache.layers:
            for state in layer.compressors():
                state.entries[cache.entry_rows(1, state.ratio, 0, 300 // state.ratio)] = float("nan")
    got = logits(model, growing, {0: ids[300:]})
    assert got.isfinite().all() and deviation(got, logits(model, full, {0: ids[300:]})) < 1e-5


def test_a_refused_batch_grows_nothing() -> None:
    _, growing = caches(random_model(CONFIG), 2, 500)
    with pytest.raises(ValueError, match="cannot take 501 more"):
        growing.reserve(np.arange(2), np.zeros(2, int), np.array([1, 501]))
    assert growing.num_pages == growing.pool.num_used == 0
