"""However a sequence is cut, packed or cached, a token's logits have the same bits.

To the bit with the native kernels, and with the reference if MKL runs in strict mode (x86 with MKL, and dsv4 imported
before the first product, as in the shared conftest); otherwise to 1e-5.
"""

import copy
import os
import re
import sys
from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv4.cache import Cache
from dsv4.kernels import backends
from dsv4.model.aux_losses import AuxLosses
from dsv4.model.batch import RaggedBatch
from dsv4.model.transformer import Transformer

from .tiny import random_ids, random_model, store, tiny_config

STRICT_MKL = torch.backends.mkl.is_available() and os.environ.get("MKL_CBWR", "").endswith("STRICT")
NATIVE = backends.native_module()
# Each with FP32 weights, which AMX leaves to AVX-512, and with stored weights. Sorted: the order of isas() depends on
# the processor's speeds.
ISAS: list[str] = sorted(NATIVE.isas()) if NATIVE is not None else []
PATHS = ["reference", *(isa for isa in ISAS if isa != "amx"), *(f"{isa}, weights as stored" for isa in ISAS)]
AS_STORED = False  # set by the fixture
LENGTH = 389
CHUNKS = (1, 3, 4, 5, 127, 128, 129, LENGTH)
SELECTS, READS_ALL = 16, 512  # values of index_topk, for up to 97 entries
SETTINGS = [("float", SELECTS), ("shipped", SELECTS), ("float", READS_ALL), ("shipped", READS_ALL)]


@pytest.fixture(params=PATHS, autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run every test on the reference and on each instruction set of this machine."""
    name, _, as_stored = request.param.partition(", ")
    monkeypatch.setattr(sys.modules[__name__], "AS_STORED", bool(as_stored))
    if name == "reference":
        monkeypatch.setattr(backends, "native_module", lambda: None)
    elif NATIVE is not None:
        NATIVE.select(name)
    yield name
    if NATIVE is not None:
        NATIVE.select(NATIVE.isas()[-1])


def strict() -> bool:
    return backends.native_module() is not None or STRICT_MKL


def close(got: Tensor, want: Tensor, numerics: str = "float") -> bool:
    """Equal up to rounding. In shipped numerics rounding may move a value to the next FP8 or FP4 code, and then a few
    tokens to other experts: a relative change of the weights by 3e-7 moves logits by 0.007 to 0.021 on average, float
    numerics by 0.08. Logits reach 4."""
    if numerics == "shipped":
        return float((got - want).abs().mean()) < 0.04
    return torch.allclose(got, want, rtol=1e-5, atol=1e-5)


def same(got: Tensor, want: Tensor, numerics: str = "float") -> bool:
    return torch.equal(got, want) if strict() else close(got, want, numerics)


def setting(numerics: str = "float", top_k: int = SELECTS) -> tuple[Transformer, Tensor, Tensor]:
    """(model, ids [389], logits of one whole forward on the current path)."""
    if backends.native_module() is None:
        return _setting("reference", AS_STORED, numerics, top_k)
    assert NATIVE is not None
    return _setting(NATIVE.selected(), AS_STORED, numerics, top_k)


@cache
def _setting(path: str, as_stored: bool, numerics: str, top_k: int) -> tuple[Transformer, Tensor, Tensor]:
    config = tiny_config(schedule=(0, 4, 128, 4), index_topk=top_k)
    model, ids = random_model(config, numerics=numerics).eval(), random_ids(config, LENGTH)
    if as_stored:
        store(model)
    with torch.no_grad():
        return model, ids, model(ids[None])[0]


@torch.no_grad()
def feed(model: Transformer, cache: Cache, ids: Tensor, slot: int = 0, chunk: int = 10**9) -> Tensor:
    """Logits of ids, appended to a cache row in chunks."""
    logits = []
    for part in ids.split(chunk):
        batch = RaggedBatch.pack([part.tolist()], starts=[cache.lengths[slot]], slots=[slot])
        logits.append(model.logits(model.forward_ragged(batch, cache)))
    return torch.cat(logits)


# Every chunk with both numerics, each top-k with both numerics.
CHUNKED = [
    *((chunk, SELECTS, "float") for chunk in CHUNKS),
    *((chunk, READS_ALL if chunk in (5, 127, 129) else SELECTS, "shipped") for chunk in CHUNKS),
    (5, READS_ALL, "float"),
]


@pytest.mark.parametrize(("chunk", "top_k", "numerics"), CHUNKED)
def test_a_chunked_sequence_has_the_bits_of_a_whole_one(chunk: int, top_k: int, numerics: str) -> None:
    model, ids, whole = setting(numerics, top_k)
    assert same(feed(model, model.new_cache(1, 400), ids, chunk=chunk), whole, numerics)


def test_uneven_chunks_through_the_padded_call() -> None:
    model, ids, whole = setting()
    both = torch.stack((ids, ids.flip(0)))
    cache = model.new_cache(2, LENGTH)
    with torch.no_grad():
        logits = torch.cat([model(part, cache) for part in both.split((2, 61, 1, 64, 130, 7, 124), dim=1)], dim=1)
        other = model(both[1:])[0]
    assert same(logits[0], whole) and same(logits[1], other)
    assert cache.lengths == [LENGTH, LENGTH]


@pytest.mark.parametrize(("numerics", "top_k"), SETTINGS)
def test_a_ragged_batch_has_the_bits_of_each_sequence_alone(numerics: str, top_k: int) -> None:
    model, ids, whole = setting(numerics, top_k)
    lengths = (3, 128, 1, LENGTH, 131, 64, 5)
    batch = RaggedBatch.pack([ids[:n].tolist() for n in lengths])
    with torch.no_grad():
        logits = model.logits(model.forward_ragged(batch))
    for part, n in zip(logits.split(lengths), lengths, strict=True):
        assert same(part, whole[:n], numerics), n


@pytest.mark.parametrize("numerics", ["float", "shipped"])
def test_more_tokens_than_a_tile_of_1024(numerics: str) -> None:
    """The native kernels process a batch in tiles; the third sequence crosses a tile border."""
    model, ids, whole = setting(numerics)
    lengths = (LENGTH, 300, LENGTH, 7)
    assert sum(lengths[:2]) < 1024 < sum(lengths[:3])
    batch = RaggedBatch.pack([ids[:n].tolist() for n in lengths])
    with torch.no_grad():
        logits = model.logits(model.forward_ragged(batch)).split(lengths)
    for part, n in zip(logits, lengths, strict=True):
        assert same(part, whole[:n], numerics), n


@pytest.mark.parametrize("hc_mult", [3, 5])
def test_odd_widths_in_chunks_have_the_bits_of_a_whole_forward(hc_mult: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No width is a multiple of 16 or of any other block size of the kernels."""
    if AS_STORED:
        pytest.skip("FP8 and FP4 have scales of 128 and 32")
    config = tiny_config(
        schedule=(0, 4, 128, 4),
        hidden_size=45,
        hc_mult=hc_mult,
        num_attention_heads=6,
        head_dim=27,
        qk_rope_head_dim=10,
        q_lora_rank=19,
        o_groups=3,
        o_lora_rank=7,
        index_n_heads=5,
        index_head_dim=21,
        n_routed_experts=7,
        num_experts_per_tok=3,
        moe_intermediate_size=21,
        index_topk=13,
    )
    model, ids = random_model(config).eval(), random_ids(config, 261)
    with torch.no_grad():
        whole = model(ids[None])[0]
    for chunk in (1, 50):
        assert same(feed(model, model.new_cache(1, 300), ids, chunk=chunk), whole), chunk
    monkeypatch.setattr(backends, "native_module", lambda: None)
    with torch.no_grad():
        assert close(whole, model.refresh()(ids[None])[0])


@pytest.mark.parametrize(("numerics", "top_k"), [SETTINGS[1], SETTINGS[2]])
def test_batched_decode_at_different_depths_has_the_bits_of_each_alone(numerics: str, top_k: int) -> None:
    """Sequences of 2, 127, 128, 255 and 3 tokens in shuffled rows, one of them in chunks beside the decoding."""
    model, ids, whole = setting(numerics, top_k)
    cache = model.new_cache(6, 400)
    at = {4: 2, 0: 127, 5: 128, 2: 255, 1: 3}
    for slot, n in at.items():
        assert same(feed(model, cache, ids[:n], slot), whole[:n], numerics)
    steps = {4: 1, 0: 1, 5: 1, 2: 1, 1: 33}
    with torch.no_grad():
        for _ in range(4):
            parts = [ids[at[slot] : at[slot] + n].tolist() for slot, n in steps.items()]
            batch = RaggedBatch.pack(parts, starts=list(at.values()), slots=list(at))
            logits = model.logits(model.forward_ragged(batch, cache)).split(list(steps.values()))
            for (slot, n), got in zip(steps.items(), logits, strict=True):
                assert same(got, whole[at[slot] : at[slot] + n], numerics), (slot, at[slot])
                at[slot] += n
    assert cache.lengths == [at.get(slot, 0) for slot in range(6)]


@pytest.mark.parametrize(("numerics", "top_k"), SETTINGS)
def test_training_forward_is_the_cached_forward(numerics: str, top_k: int) -> None:
    model, ids, whole = setting(numerics, top_k)
    batch = RaggedBatch.pack([ids.tolist(), ids[:77].tolist()])
    model = copy.deepcopy(model).requires_grad_()
    with torch.enable_grad():
        logits = model.logits(model.forward_ragged(batch, aux=AuxLosses()))
    assert logits.requires_grad
    # Gradients come from the reference, which agrees with the native kernels to rounding.
    like = same if backends.native_module() is None else close
    assert like(logits.detach()[:LENGTH], whole, numerics) and like(logits.detach()[LENGTH:], whole[:77], numerics)


def test_a_cache_holds_no_graph() -> None:
    """With gradients on, a cached forward gives the same logits, and the cache keeps values only."""
    model, ids, whole = setting()
    cache, model = model.new_cache(1, 140), copy.deepcopy(model).requires_grad_()
    with torch.enable_grad():
        logits = torch.cat([model(part[None], cache)[0] for part in ids[:140].split(67)])
    like = same if backends.native_module() is None else close
    assert logits.requires_grad and like(logits.detach(), whole[:140])
    for layer in cache.layers:
        tensors = [layer.window, *(t for s in layer.compressors() for t in (s.kv, s.score, s.entries))]
        assert not any(t.requires_grad for t in tensors)


@pytest.mark.parametrize("numerics", ["float", "shipped"])
def test_one_thread_and_two_give_the_same_bits(numerics: str) -> None:
    if not strict():
        pytest.skip("only strict mode promises bits")
    model, ids, whole = setting(numerics)
    drafted = draft(model, ids[:150], 67)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2) if backends.native_module() is None else (1, 2, 3):
            torch.set_num_threads(threads)
            with torch.no_grad():
                assert torch.equal(model(ids[None])[0], whole)
            assert torch.equal(feed(model, model.new_cache(1, 400), ids[:80], chunk=20), whole[:80])
            assert torch.equal(feed(model, model.new_cache(1, 400), ids[:8], chunk=1), whole[:8])
            assert torch.equal(draft(model, ids[:150], 67), drafted)
            cache, at = model.new_cache(4, 400), (255, 3, 128, 200)
            for slot, n in enumerate(at):
                feed(model, cache, ids[:n], slot)
            for step in range(5):  # in one batch; in some steps windows of 4 and of 128 close
                batch = RaggedBatch.pack([[int(ids[n + step])] for n in at], starts=cache.lengths)
                with torch.no_grad():
                    logits = model.logits(model.forward_ragged(batch, cache))
                assert torch.equal(logits, whole[[n + step for n in at]])
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def draft(model: Transformer, ids: Tensor, chunk: int) -> Tensor:
    """MTP logits at every token but the last; main model and MTP block share one cache."""
    cache, logits = model.new_cache(1, 400), []
    for start in range(0, len(ids) - 1, chunk):
        part = ids[start : min(start + chunk, len(ids) - 1)]
        batch = RaggedBatch.pack([part.tolist()], starts=[start])
        streams = model.forward_ragged(batch, cache)
        drafted = model.mtp_forward(streams, ids[start + 1 : start + 1 + len(part)], batch, cache)
        logits.append(model.mtp_logits(drafted))
    return torch.cat(logits)


@pytest.mark.parametrize("numerics", ["float", "shipped"])
def test_the_mtp_block_in_chunks_has_the_bits_of_a_whole_forward(numerics: str) -> None:
    model, ids, _ = setting(numerics)
    batch = RaggedBatch.pack([ids[:-1].tolist()])
    with torch.no_grad():
        whole = model.mtp_logits(model.mtp_forward(model.forward_ragged(batch), ids[1:], batch))
    for chunk in (5, 65, 129):
        assert same(draft(model, ids, chunk), whole, numerics), chunk
    assert same(draft(model, ids[:20], 1), whole[:19], numerics)


# Going back and starting over


@pytest.mark.parametrize(("numerics", "top_k"), [SETTINGS[1], SETTINGS[2]])
@pytest.mark.parametrize("held", [1, 3, 125, 130, 254])
def test_a_restored_snapshot_continues_to_the_same_bits(held: int, numerics: str, top_k: int) -> None:
    """Feed enough wrong tokens to close windows of 4 and of 128 and to wrap the window ring, restore, continue."""
    model, ids, whole = setting(numerics, top_k)
    cache = model.new_cache(2, 600)
    feed(model, cache, ids[:held], slot=1)
    snap = cache.snapshot(1)
    for wrong in (2, 7, 140):
        feed(model, cache, random_ids(model.config, wrong, seed=wrong), slot=1, chunk=67)
        assert cache.lengths == [0, held + wrong]
        cache.restore(1, snap)
        assert cache.lengths == [0, held]
        assert same(feed(model, cache, ids[held : held + 135], slot=1), whole[held : held + 135], numerics)
        cache.restore(1, snap)


@pytest.mark.parametrize(("numerics", "top_k"), SETTINGS)
def test_every_path_gives_the_reference_logits(numerics: str, top_k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to rounding; and all instruction sets with fused multiply-add give the same bits."""
    _, _, whole = setting(numerics, top_k)
    if NATIVE is not None and backends.native_module() is not None and NATIVE.selected().startswith("avx512"):
        NATIVE.select("avx2")
        assert torch.equal(whole, setting(numerics, top_k)[2])
    monkeypatch.setattr(backends, "native_module", lambda: None)
    assert close(whole, setting(numerics, top_k)[2], numerics)


@pytest.mark.parametrize("top_k", [SELECTS, READS_ALL])
def test_a_reset_row_forgets(top_k: int) -> None:
    """Nothing of a longer sequence that was in the row before may be read."""
    model, ids, whole = setting("float", top_k)
    cache = model.new_cache(2, 400)
    feed(model, cache, random_ids(model.config, LENGTH, seed=5), slot=1)
    neighbour = feed(model, cache, ids[:50], slot=0)
    cache.reset(1)
    assert cache.lengths == [50, 0]
    assert same(feed(model, cache, ids[:200], slot=1, chunk=9), whole[:200])
    assert same(torch.cat((neighbour, feed(model, cache, ids[50:60], slot=0))), whole[:60])


# Index keys are kept rounded beside their entries, which are the truth.


@pytest.mark.parametrize("numerics", ["float", "shipped"])
def test_tokens_one_by_one_after_a_restore_take_another_way(numerics: str) -> None:
    model, ids, whole = setting(numerics)
    cache = model.new_cache(2, 400)
    feed(model, cache, ids[:201], slot=1)
    feed(model, cache, ids[201:206], slot=1, chunk=1)
    snap = cache.snapshot(1)
    for wrong in (5, 70):
        feed(model, cache, random_ids(model.config, wrong, seed=wrong), slot=1, chunk=1)
        cache.restore(1, snap)
        assert same(feed(model, cache, ids[206:222], slot=1, chunk=1), whole[206:222], numerics), wrong
        cache.restore(1, snap)


def test_entries_written_from_outside_are_read() -> None:
    """Two sequences exchange rows, with everything that the rows hold."""
    model, ids, whole = setting()
    other = ids.flip(0)
    cache = model.new_cache(2, 400)
    for slot, of in enumerate((ids, other)):
        feed(model, cache, of[:250], slot)
        feed(model, cache, of[250:254], slot, chunk=1)
    for layer in cache.layers:
        layer.window[:] = layer.window.flip(0)
        for state in layer.compressors():
            state.kv[:], state.score[:] = state.kv.flip(0), state.score.flip(0)
            rows = [cache.entry_rows(slot, state.ratio, 0, 254 // state.ratio) for slot in (0, 1)]
            state.entries[np.concatenate(rows)] = state.entries[np.concatenate(rows[::-1])]
    cache.changed(0)
    cache.changed(1)
    assert same(feed(model, cache, ids[254:270], slot=1, chunk=1), whole[254:270])


def test_choices_among_long_keys_stay_exact_in_later_calls(path: str) -> None:
    """Rounded, keys of 10^6 are indistinguishable; choices stay exact, also in calls after the one that rounds them."""
    if path not in ("avx512_vnni", "avx512_bf16"):
        pytest.skip("the instruction set keeps nothing, or nothing with the same bits computes every score")
    assert NATIVE is not None
    model, ids, _ = setting()
    logits = []
    for isa in (path, "avx512"):
        NATIVE.select(isa)
        cache = model.new_cache(1, 400)
        feed(model, cache, ids[:250])
        for layer in cache.layers:
            if layer.index is not None:
                layer.index.entries[cache.entry_rows(0, 4, 0, 40), 0] = 1e6
        cache.changed(0)
        logits.append(feed(model, cache, ids[250:282], chunk=1))
    assert torch.equal(*logits)


@pytest.mark.parametrize("numerics", ["float", "shipped"])
@torch.no_grad()
def test_logits_of_some_tokens_in_one_call(numerics: str) -> None:
    """Chunks of several sequences, some of which sample, as in an engine's step."""
    model, ids, whole = setting(numerics)
    cache, at = model.new_cache(4, 400), [1, 126, 3, 250]
    for slot, n in enumerate(at):
        feed(model, cache, ids[:n], slot)
    for lengths, rows in (([1, 4, 1, 130], [0, 135]), ([129, 1, 3, 1], [128, 129, 132]), ([2, 1, 1, 1], [])):
        ends = np.cumsum(lengths)
        parts = [ids[n : n + count].tolist() for n, count in zip(at, lengths, strict=True)]
        batch = RaggedBatch.pack(parts, starts=at)
        assert torch.equal(batch.token_ids, torch.cat([ids[n : n + c] for n, c in zip(at, lengths, strict=True)]))
        logits = model.next_token_logits(batch, cache, np.array(rows, dtype=np.int64))
        assert logits.shape == (len(rows), model.config.vocab_size)
        for row, got in zip(rows, logits, strict=True):
            sequence = int(np.searchsorted(ends, row, side="right"))
            assert same(got, whole[at[sequence] + row - int(ends[sequence] - lengths[sequence])])
        at = [n + count for n, count in zip(at, lengths, strict=True)]
        assert cache.lengths == at
    batch = RaggedBatch.pack([ids[:5].tolist(), ids[:9].tolist()])
    assert same(model.next_token_logits(batch), torch.cat((whole[:5], whole[:9])))
    assert same(model.next_token_logits(batch, rows=np.array([4, 13])), whole[[4, 8]])


# Refusals


def test_batches_that_do_not_fit_the_cache_are_refused() -> None:
    model, ids, _ = setting()
    cache = model.new_cache(2, 10)
    feed(model, cache, ids[:8])
    with pytest.raises(ValueError, match="cache row 0 holds 8 tokens and cannot take 3 more: max_tokens is 10"):
        feed(model, cache, ids[:3])
    with pytest.raises(ValueError, match="cache row 2: the cache has rows 0 to 1"):
        model.forward_ragged(RaggedBatch.pack([[1]], slots=[2]), cache)
    with pytest.raises(ValueError, match="cache row 0 holds 8 tokens, the batch starts at 0"):
        model.forward_ragged(RaggedBatch.pack([[1]]), cache)
    with pytest.raises(ValueError, match="cache row 1 is named by 2 sequences of the batch; allowed is one"):
        model.forward_ragged(RaggedBatch.pack([[1], [2]], slots=[1, 1]), cache)
    batch = RaggedBatch.pack([[1, 2, 3]], slots=[1])
    for rows, wrong in (
        ([3], "rows[0] is 3"),
        ([1, 1], "rows[1] is 1"),
        ([2, 0], "rows[1] is 0"),
        ([-1], "rows[0] is -1"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"{wrong}: allowed are 0 to 2, each more than the one before")):
            model.next_token_logits(batch, cache, np.array(rows))
    assert cache.lengths == [8, 0]
    with pytest.raises(ValueError, match="every sequence at least one token"):
        RaggedBatch.pack([[1], []])
    with pytest.raises(ValueError, match="token id 97: allowed are 0 to 96"):
        model(torch.tensor([[97]]))
    with pytest.raises(ValueError, match="input_ids has 1 rows, the cache 2"):
        model(torch.tensor([[1]]), cache)
    with pytest.raises(ValueError, match="numerics 'fp8': allowed are float, bf16, shipped"):
        Transformer(model.config, "fp8")


@pytest.mark.parametrize("top_k", [SELECTS, READS_ALL])
@torch.no_grad()
def test_non_finite_values_stay_in_their_sequence(top_k: int) -> None:
    """A masked key is multiplied by zero, and 0 * NaN is NaN: masked places must not point to another row's entries."""
    model, ids, whole = setting(top_k=top_k)
    cache = model.new_cache(3, 400)
    for slot in range(3):
        feed(model, cache, ids[:300], slot)
    for layer in cache.layers:
        layer.window[1] = float("nan")
        for state in layer.compressors():
            state.entries[cache.entry_rows(1, state.ratio, 0, 300 // state.ratio)] = float("nan")
    cache.changed(1)
    parts = [ids[300:301].tolist(), ids[300:340].tolist(), ids[300:305].tolist()]
    batch = RaggedBatch.pack(parts, starts=[300] * 3, slots=[1, 0, 2])
    logits = model.logits(model.forward_ragged(batch, cache)).split([1, 40, 5])
    assert logits[0].isnan().any()
    assert same(logits[1], whole[300:340]) and same(logits[2], whole[300:305])
    cache.reset(1)
    assert same(feed(model, cache, ids[:70], slot=1, chunk=7), whole[:70])
