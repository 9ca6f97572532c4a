"""Rows as a cache stores them: what is written comes back, and a cache in the published formats changes no bit."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dsv4.analysis.kv import KvFormat, cache_bytes, kv_bytes_per_token
from dsv4.cache import Cache, Snapshot
from dsv4.cache.formats import ShippedIndexKeys, ShippedKeys, cache_dtype, index_key_format, key_format
from dsv4.config import ModelConfig
from dsv4.kernels import backends
from dsv4.kernels.quant import fake_quant_bf16, fake_quant_fp4, fake_quant_fp8
from dsv4.model.batch import RaggedBatch
from dsv4.model.transformer import Transformer

from ..model.tiny import random_ids, random_model, tiny_config

CPU = torch.device("cpu")
NATIVE = backends.native_module()
PATHS = ["reference", *(sorted(NATIVE.isas()) if NATIVE is not None else [])]
# Odd and ragged blocks of codes: 16 of 64 in FP8 and 32 of 32 in FP4; 136 and 128; 80 and 16.
WIDTHS = [(32, 16, 32), (200, 64, 128), (96, 16, 16)]
LENGTH = 300


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run a test on the reference and on each instruction set of this machine."""
    if request.param == "reference":
        monkeypatch.setattr(backends, "native_module", lambda: None)
    elif NATIVE is not None:
        NATIVE.select(request.param)
    yield request.param
    if NATIVE is not None:
        NATIVE.select(NATIVE.isas()[-1])


def rows_of_keys(config: ModelConfig, count: int) -> tuple[ShippedKeys, Tensor]:
    """(format, keys that were rounded to it, of all magnitudes)."""
    form = key_format(config, "shipped")
    assert isinstance(form, ShippedKeys)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(count, form.width, generator=g) * torch.exp2(torch.randint(-20, 20, (count, 1), generator=g))
    plain = form.width - form.rotary
    return form, torch.cat((fake_quant_fp8(x[:, :plain], 64), fake_quant_bf16(x[:, plain:])), 1)


@pytest.mark.parametrize("widths", WIDTHS)
def test_rounded_keys_come_back_to_the_bit(widths: tuple[int, int, int]) -> None:
    config = tiny_config(head_dim=widths[0], qk_rope_head_dim=widths[1], index_head_dim=widths[2])
    form, keys = rows_of_keys(config, 200)
    stored = form.encode(keys)
    assert stored.dtype == torch.uint8 and stored.shape == (200, form.columns)
    assert torch.equal(form.decode(stored).view(torch.int32), keys.view(torch.int32))
    index = index_key_format(config, "shipped")
    assert isinstance(index, ShippedIndexKeys)
    keys = fake_quant_fp4(torch.randn(200, index.width) * torch.exp2(torch.arange(-100.0, 100.0))[:, None])
    assert torch.equal(index.decode(index.encode(keys)).view(torch.int32), keys.view(torch.int32))


def test_every_code_under_every_largest_one_comes_back() -> None:
    """The stored scale may be smaller than that of the rounding, never so that a value is lost."""
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    form = ShippedKeys(128, 0, 128 + 8)
    for largest in range(1, 127):
        block = codes.masked_fill(codes > codes[largest], 0.0)
        rows = torch.nn.functional.pad(block, (0, 1)).expand(40, -1) * torch.exp2(torch.arange(-10.0, 30.0))[:, None]
        keys = torch.cat((rows[:, ::2], -rows[:, 1::2]), 1)
        assert torch.equal(form.decode(form.encode(keys)), fake_quant_fp8(keys, 64))
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    index = ShippedIndexKeys(8, 4 + 1)
    for largest in range(1, 8):
        keys = values.masked_fill(values > values[largest], 0.0) * torch.exp2(torch.arange(-120.0, 120.0))[:, None]
        assert torch.equal(index.decode(index.encode(keys)), keys)


def test_a_blank_row_is_zeros_and_a_block_that_is_not_finite_is_nan() -> None:
    config = tiny_config(head_dim=200, qk_rope_head_dim=64, index_head_dim=64)
    for form in (key_format(config, "shipped"), index_key_format(config, "shipped")):
        assert not form.decode(torch.zeros(2, form.columns, dtype=torch.uint8)).any()
        for value in (float("nan"), float("inf")):
            x = torch.ones(1, form.width)
            x[0, 3] = value
            assert form.decode(form.encode(x))[0].isnan().any()


def test_names_of_the_cache_dtype() -> None:
    assert cache_dtype("auto", "shipped", torch.float32) == "shipped"
    assert cache_dtype("auto", "float", torch.bfloat16) == torch.bfloat16
    assert cache_dtype("float32", "shipped", torch.bfloat16) == torch.float32
    with pytest.raises(ValueError, match="kv_cache_dtype 'fp8': allowed are auto, bfloat16, float32"):
        cache_dtype("fp8", "float", torch.float32)


@pytest.mark.parametrize("preset", ["nano", "flash"])
def test_live_bytes_are_those_of_the_analysis(preset: str) -> None:
    config, tokens = ModelConfig.preset(preset), 256
    formats: list[tuple[str, KvFormat]] = [("float32", "fp32"), ("bfloat16", "bf16"), ("auto", "fp8+fp4")]
    for name, kv_format in formats:
        cache = Cache(config, 1, tokens, CPU, cache_dtype(name, "shipped", torch.float32))
        size, wanted = cache.num_bytes(), cache_bytes(config, tokens, kv_format)
        blank = [[c.entries[-1].nbytes for c in layer.compressors()] for layer in cache.layers]
        assert size["entries"] == wanted.entries + sum(row[0] for row in blank if row)
        assert size["index_keys"] == wanted.index_keys + sum(row[1] for row in blank if len(row) > 1)
        assert size["state"] == wanted.states
        layers = config.num_hidden_layers
        assert size["window"] * layers == wanted.windows * (layers + config.num_nextn_predict_layers)
        assert cache.page_bytes == 128 * kv_bytes_per_token(config, kv_format)
    if preset == "flash":
        assert cache.page_bytes == 128 * 3514.25


def model_of(widths: tuple[int, int, int], numerics: str = "shipped") -> tuple[Transformer, list[int]]:
    config = tiny_config(
        schedule=(0, 4, 128, 4),
        index_topk=16,
        head_dim=widths[0],
        qk_rope_head_dim=widths[1],
        index_head_dim=widths[2],
    )
    return random_model(config, numerics=numerics).freeze(), random_ids(config, LENGTH).tolist()


def step(model: Transformer, cache: Cache, parts: dict[int, list[int]]) -> list[Tensor]:
    """Logits of tokens appended to cache rows, and of the MTP block after them."""
    batch = RaggedBatch.pack(list(parts.values()), starts=[cache.lengths[s] for s in parts], slots=list(parts))
    streams = model.forward_ragged(batch, cache)
    ahead = model.mtp_forward(streams, batch.token_ids.roll(-1), batch, cache)
    return [model.logits(streams), model.mtp_logits(ahead)]


@torch.no_grad()
def play(model: Transformer, cache: Cache, ids: list[int], chunk: int = 37) -> list[Tensor]:
    """Logits of a story: whole, chunked and batched, one token at a time, going back, sharing, moving out and in."""
    out = step(model, cache, {0: ids})
    for at in range(0, 2 * 74, chunk):
        out += step(model, cache, {1: ids[at : at + chunk], 2: ids[at : at + chunk][::-1]})
    for token in ids[148:156]:
        out += step(model, cache, {2: [token], 0: [token]})
    kept = cache.snapshot(1)
    out += step(model, cache, {1: ids[148:200]})
    cache.restore(1, Snapshot.from_bytes(kept.to_bytes()))
    out += step(model, cache, {1: ids[148:180]})
    cache.share(1, 3, cache.lengths[1])
    cache.restore(3, cache.snapshot(1))
    out += step(model, cache, {3: ids[180:220], 1: ids[180:200][::-1]})  # both write to copies of shared pages
    saved = cache.save(3)
    cache.reset(3)
    cache.load(3, saved)
    return out + step(model, cache, {3: ids[220:260]})


@pytest.mark.parametrize("widths", WIDTHS)
def test_the_published_formats_change_no_bit(path: str, widths: tuple[int, int, int]) -> None:
    model, ids = model_of(widths)
    exact = Cache(model.config, 4, 400, CPU, torch.float32)
    stored, growing = model.new_cache(4, 400), Cache(model.config, 4, 400, CPU, "shipped", grows=True)
    want = play(model, exact, ids)
    assert {layer.window.dtype for layer in stored.layers} == {torch.uint8}
    for cache in (stored, growing):
        assert all(torch.equal(a, b) for a, b in zip(play(model, cache, ids), want, strict=True)), path
    for now, before in zip(stored.layers, exact.layers, strict=True):
        assert torch.equal(now.format.decode(now.window), before.window)
        for c, e in zip(now.compressors(), before.compressors(), strict=True):
            rows = torch.from_numpy(stored.entry_rows(0, c.ratio, 0, LENGTH // c.ratio))
            same = torch.from_numpy(exact.entry_rows(0, c.ratio, 0, LENGTH // c.ratio))
            assert torch.equal(c.format.encode(e.entries[same]), c.entries[rows]), "bytes are those of the definition"


def test_a_bfloat16_cache_does_not_depend_on_the_cut(path: str) -> None:
    """In float numerics it rounds keys before their first use."""
    if path == "reference" and not torch.backends.mkl.is_available():
        pytest.skip("products depend on their number of rows")
    model, ids = model_of(WIDTHS[1], "float")
    whole = model.new_cache(1, 400, kv_cache_dtype="bfloat16")
    with torch.no_grad():
        want = step(model, whole, {0: ids})[0]
        for chunk in (64, 129):
            cache = model.new_cache(1, 400, kv_cache_dtype="bfloat16")
            parts = [step(model, cache, {0: ids[at : at + chunk]})[0] for at in range(0, LENGTH, chunk)]
            got = torch.cat(parts)
            assert torch.equal(got, want) if path != "reference" else torch.allclose(got, want, atol=0.05), chunk
    assert cache.page_bytes * 2 == model.new_cache(1, 400).page_bytes


def test_only_shipped_rows_take_no_second_copy_of_index_keys() -> None:
    if NATIVE is None or "avx512_vnni" not in NATIVE.isas():
        pytest.skip("no instruction set of this machine keeps keys")
    for numerics, kept in (("float", True), ("shipped", False)):
        model, ids = model_of(WIDTHS[1], numerics)
        cache = model.new_cache(1, 400)
        with torch.no_grad():
            step(model, cache, {0: ids})
            step(model, cache, {0: ids[:1]})
        assert cache.native is not None and bool(cache.native.quantized_rows) is kept
