"""The state after a prefix, computed anew from its last tokens over stored entries, has the bits of a whole forward."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from dsv4.cache import Cache
from dsv4.config import PAGE_TOKENS, WINDOW
from dsv4.kernels import backends
from dsv4.model.batch import RaggedBatch
from dsv4.model.transformer import Transformer

from .tiny import random_ids, random_model, tiny_config

STRICT_MKL = torch.backends.mkl.is_available() and os.environ.get("MKL_CBWR", "").endswith("STRICT")
PATHS = ["reference", *(["native"] if backends.native_module() is not None else [])]
CONFIG = tiny_config(schedule=(0, 4, 128, 4), index_topk=16, max_position_embeddings=4096)
DEPTH = CONFIG.num_hidden_layers * WINDOW
STORED = DEPTH + 3 * PAGE_TOKENS
IDS: list[int] = random_ids(CONFIG, STORED + 300).tolist()


@pytest.fixture(params=["float", "shipped"])
def numerics(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=PATHS)
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, numerics: str) -> Transformer:
    if request.param == "reference":
        monkeypatch.setattr(backends, "native_module", lambda: None)
    with torch.no_grad():
        return random_model(CONFIG, numerics=numerics)


def same(a: Tensor, b: Tensor) -> bool:
    """To the bit where other chunks give the same bits (see test_chunking.py)."""
    if backends.native_module() is not None or STRICT_MKL:
        return torch.equal(a, b)
    return torch.allclose(a, b, atol=1e-4)


def run(model: Transformer, cache: Cache, slot: int, stop: int, chunk: int = 1 << 20) -> Tensor:
    """Compute a row up to `stop` tokens. Returns the logits of the last chunk."""
    logits = torch.empty(0)
    with torch.inference_mode():
        while cache.lengths[slot] < stop:
            start = cache.lengths[slot]
            part = IDS[start : min(start + chunk, stop)]
            logits = model.next_token_logits(RaggedBatch.pack([part], starts=[start], slots=[slot]), cache)
    return logits


def replayed(model: Transformer, cache: Cache, start: int) -> None:
    """Row 1 begins at `start` with the entries of row 0's first STORED tokens, in pages that both hold."""
    cache.reset(1)
    cache.share(0, 1, STORED)
    cache.replay(1, start, STORED)


@pytest.mark.parametrize("chunk", [1 << 20, 129, 63])
def test_a_replay_has_the_state_and_the_logits_of_a_whole_forward(model: Transformer, chunk: int) -> None:
    cache = model.new_cache(2, 2048)
    run(model, cache, 0, STORED)
    pages = cache.pages_of(0)
    entries = [c.read_pages(pages) for layer in cache.layers for c in layer.compressors()]
    want = cache.snapshot(0).fields()
    replayed(model, cache, STORED - DEPTH)
    assert cache.is_replaying(1)
    run(model, cache, 1, STORED, chunk)
    assert not cache.is_replaying(1)
    got = cache.snapshot(1).fields()
    main = [name for name in want if not name.startswith("layers.4")]  # not the MTP block, which does not run
    assert all(same(got[name], want[name]) for name in main)
    assert cache.pages_of(1) == pages, "nothing was written, so that no page was copied"
    now = [c.read_pages(pages) for layer in cache.layers for c in layer.compressors()]
    assert all(torch.equal(a, b) for a, b in zip(entries, now, strict=True))
    for stop in (
        STORED + 1,
        STORED + 3,
        STORED + 4,
        STORED + 5,
        STORED + 127,
        STORED + 128,
        STORED + 129,
        STORED + 260,
    ):
        assert same(run(model, cache, 0, stop)[-1], run(model, cache, 1, stop, chunk)[-1])


@pytest.mark.parametrize("after", [1, 3, 4, 127, 128, 200])
def test_a_chunk_may_go_on_past_the_stored_entries(model: Transformer, after: int) -> None:
    """Beside a row that is written at the same positions."""
    cache = model.new_cache(2, 2048)
    run(model, cache, 0, STORED)
    replayed(model, cache, STORED - DEPTH)
    got = run(model, cache, 1, STORED + after)
    assert same(got[-after:], run(model, cache, 0, STORED + after))


def test_fewer_tokens_than_the_windows_of_all_layers_are_too_few(model: Transformer) -> None:
    """And without stored entries those of the replay would be others: both are what make it exact."""
    cache = model.new_cache(2, 2048)
    run(model, cache, 0, STORED)
    want = run(model, cache, 0, STORED + 9)
    replayed(model, cache, STORED - 2 * WINDOW)
    assert not same(run(model, cache, 1, STORED + 9)[-9:], want)
    replayed(model, cache, STORED - DEPTH)
    cache.stored[1] = 0
    assert not same(run(model, cache, 1, STORED + 9)[-9:], want)
