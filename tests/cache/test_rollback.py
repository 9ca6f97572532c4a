"""Taking back the last tokens of a row: the row is, to the bit, what it would be without them."""

from __future__ import annotations

import copy
import os

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv4.cache import Cache, RowLog, Snapshot
from dsv4.kernels import backends
from dsv4.model.batch import RaggedBatch
from dsv4.model.transformer import Transformer

from ..model.tiny import random_ids, random_model, tiny_config

BITS = torch.backends.mkl.is_available() and os.environ.get("MKL_CBWR", "").endswith("STRICT")
CONFIG = tiny_config(schedule=(0, 4, 128, 4), index_topk=8)
IDS: list[int] = random_ids(CONFIG, 400).tolist()
GUESSES: list[int] = random_ids(CONFIG, 8, seed=1).tolist()


@pytest.fixture(scope="module", params=["reference", "native"])
def model(request: pytest.FixtureRequest) -> Transformer:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "reference":
            patch.setattr(backends, "native_module", lambda: None)
        elif backends.native_module() is None:
            pytest.skip("the native kernels are not built")
        return random_model(CONFIG)


def run(model: Transformer, cache: Cache, tokens: list[int], slot: int = 1) -> Tensor:
    batch = RaggedBatch.pack([tokens], [cache.lengths[slot]], [slot])
    with torch.inference_mode():
        return model.next_token_logits(batch, cache, np.array([len(tokens) - 1]))


def new_cache(model: Transformer, tokens: int) -> Cache:
    """Row 1 holds the first tokens of IDS."""
    cache = model.new_cache(2, 512)
    run(model, cache, IDS[:tokens])
    return cache


def alike(model: Transformer, a: Tensor, b: Tensor) -> bool:
    """To the bit; where batches of other sizes have other bits (tests/model/test_chunking.py), up to rounding."""
    return torch.equal(a, b) if BITS or model.backend.name == "native" else torch.allclose(a, b, atol=1e-4)


def equal(model: Transformer, a: Snapshot, b: Snapshot) -> bool:
    return a.length == b.length and all(alike(model, t, b.fields()[name]) for name, t in a.fields().items())


@pytest.mark.parametrize("start", [1, 3, 6, 120, 126, 127, 128, 130, 252, 255, 300])
def test_rejected_tokens_leave_no_trace(model: Transformer, start: int) -> None:
    before = new_cache(model, start)
    for drafts, standing in ((1, 0), (2, 1), (3, 0), (4, 3), (7, 0), (7, 2), (7, 6)):
        wanted, cache = copy.deepcopy(before), copy.deepcopy(before)
        run(model, wanted, IDS[start : start + 1 + standing])
        cache.expect_drafts(1, start + 1, drafts)
        run(model, cache, IDS[start : start + 1 + standing] + GUESSES[: drafts - standing])
        assert not equal(model, cache.snapshot(1), wanted.snapshot(1))
        cache.truncate(1, start + 1 + standing)
        assert equal(model, cache.snapshot(1), wanted.snapshot(1))
        assert cache.pages_of(1) == wanted.pages_of(1) and cache.num_free_pages == wanted.num_free_pages
        rest = IDS[start + 1 + standing : start + 40]
        assert alike(model, run(model, cache, rest), run(model, wanted, rest))
        assert equal(model, cache.snapshot(1), wanted.snapshot(1))


def test_lengths_and_pages_alone_are_not_enough(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past 128 tokens every draft overwrites a key that the window still holds."""
    wanted, cache = new_cache(model, 201), new_cache(model, 200)
    cache.expect_drafts(1, 201, 3)
    run(model, cache, [IDS[200], *GUESSES[:3]])
    monkeypatch.setattr(RowLog, "put_back", lambda *_: None)
    cache.truncate(1, 201)
    assert not alike(model, run(model, cache, IDS[201:205]), run(model, wanted, IDS[201:205]))


def test_a_page_that_only_drafts_needed_is_free_again(model: Transformer) -> None:
    cache = new_cache(model, 127)
    cache.expect_drafts(1, 128, 2)
    run(model, cache, [IDS[127], *GUESSES[:2]])
    assert len(cache.pages_of(1)) == 2
    cache.truncate(1, 128)
    assert len(cache.pages_of(1)) == 1 and cache.pool.num_used == 1


def test_a_row_goes_back_as_far_as_its_drafts_and_once(model: Transformer) -> None:
    cache = new_cache(model, 20)
    cache.truncate(1, 20)
    with pytest.raises(ValueError, match="cache row 1 holds 20 tokens, none of them a draft, and cannot go to 19"):
        cache.truncate(1, 19)
    cache.expect_drafts(1, 21, 2)
    run(model, cache, [IDS[20], *GUESSES[:2]])
    with pytest.raises(ValueError, match="cache row 1 holds 23 tokens and can go back to 21 at the earliest, not to 2"):
        cache.truncate(1, 20)
    cache.expect_drafts(1, 24, 2)
    run(model, cache, [IDS[20], *GUESSES[:2]])
    cache.truncate(1, 25)
    with pytest.raises(ValueError, match="can go back to 25 at the earliest, not to 24"):
        cache.truncate(1, 24)
    with pytest.raises(ValueError, match="cache row 1 takes 9 tokens with drafts; allowed: 8"):
        cache.expect_drafts(1, 26, 8)


def test_the_state_of_the_mtp_block_is_part_of_a_snapshot(model: Transformer) -> None:
    cache = new_cache(model, 9)
    state = cache.keep_streams(torch.float32)
    state.read[1], state.ends[1] = 8, 9
    pending = torch.randn(CONFIG.hc_mult, CONFIG.hidden_size)
    state.streams[128 + 8] = pending
    snapshot = Snapshot.from_bytes(cache.snapshot(1).to_bytes())
    assert torch.equal(snapshot.fields()["mtp.streams"], pending)
    cache.share(1, 0, 9)
    cache.restore(0, snapshot)
    assert state.read[0] == 8 and torch.equal(state.streams[8], pending)
    state.read[1] = 7  # the block has not read what it should have
    assert cache.snapshot(1).mtp_streams is None
    state.read[1], state.ends[1] = 9, 8  # its streams of the last token were not kept
    assert cache.snapshot(1).mtp_streams is None
    without = new_cache(model, 9)
    without.restore(1, snapshot)
    assert without.mtp is None and without.snapshot(1).mtp_streams is None


def test_without_its_state_the_mtp_block_begins_with_an_empty_window(model: Transformer) -> None:
    snapshot = new_cache(model, 9).snapshot(1)
    cache = new_cache(model, 9)
    state = cache.keep_streams(torch.float32)
    cache.layers[-1].window[1] = 3.0
    cache.restore(1, snapshot)
    assert state.read[1] == 9 and not cache.layers[-1].window[1].any()
