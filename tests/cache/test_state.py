"""Snapshots: to bytes and back, into another row, and what is refused."""

import pytest
import safetensors.torch
import torch

from dsv4.cache import Cache, Snapshot
from dsv4.cache.tensors import new_layer
from dsv4.config import COMPRESSION_KINDS, ModelConfig

from ..model.tiny import tiny_config

CPU = torch.device("cpu")
CONFIG = tiny_config(schedule=(0, 4, 128))


def filled(config: ModelConfig = CONFIG, dtype: torch.dtype = torch.float32) -> Cache:
    """A cache of three rows whose state is noise; row 1 holds 5 tokens."""
    cache = Cache(config, 3, 300, CPU, dtype)
    cache.reserve(*(torch.tensor([n]).numpy() for n in (1, 0, 5)))
    cache.advance(torch.tensor([1]).numpy(), torch.tensor([5]).numpy())
    generator = torch.Generator().manual_seed(0)
    for layer in cache.layers:
        for tensor in layer.tensors():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fields_have_names_and_come_back_from_bytes(dtype: torch.dtype) -> None:
    snapshot = filled(dtype=dtype).snapshot(1)
    names = [f"layers.{i}.window" for i in range(4)]
    names += [f"layers.{i}.main.{t}" for i in (1, 2) for t in ("kv", "score")]
    names += [f"layers.1.index.{t}" for t in ("kv", "score")]
    assert sorted(snapshot.fields()) == sorted(names)
    data = snapshot.to_bytes()
    again = Snapshot.from_bytes(data)
    assert again.length == 5 and again.fields().keys() == snapshot.fields().keys()
    for name, tensor in snapshot.fields().items():
        assert again.fields()[name].dtype == tensor.dtype and torch.equal(again.fields()[name], tensor)
    assert again.to_bytes() == data and len(data) < snapshot.num_bytes + 4000


def test_a_state_moves_to_another_row_and_its_neighbours_stay() -> None:
    cache = filled()
    snapshot, before = cache.snapshot(1), cache.snapshot(2)
    cache.share(1, 0, 5)
    cache.restore(0, Snapshot.from_bytes(snapshot.to_bytes()))
    assert cache.lengths == [5, 5, 0]
    assert all(torch.equal(t, snapshot.fields()[name]) for name, t in cache.snapshot(0).fields().items())
    assert all(torch.equal(t, before.fields()[name]) for name, t in cache.snapshot(2).fields().items())


def test_a_snapshot_is_a_copy() -> None:
    cache = filled()
    snapshot = cache.snapshot(1)
    kept = {name: tensor.clone() for name, tensor in snapshot.fields().items()}
    cache.reset(1)
    assert all(torch.equal(tensor, snapshot.fields()[name]) for name, tensor in kept.items())
    assert not cache.snapshot(1).layers[0].window.any(), "a row that was reset holds nothing of its former sequence"


def test_foreign_and_cut_bytes_are_refused() -> None:
    data = filled().snapshot(1).to_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    for foreign in (
        b"",
        b"{}",
        data[: header // 2],
        bytes(100),
        safetensors.torch.save({"x": torch.ones(2)}),
        data[1:],
    ):
        with pytest.raises(ValueError, match="not a dsv4 cache state"):
            Snapshot.from_bytes(foreign)
    for cut in (data[:-1], data[:header]):
        with pytest.raises(ValueError, match=f"cache state of {len(cut)} bytes is cut or damaged"):
            Snapshot.from_bytes(cut)
    fields = filled().snapshot(1).fields()
    for about, words in (
        ('{"version": 2, "length": 5}', "of version 2; this program reads version 1"),
        ('{"version": 1, "length": -5}', "of length -5; allowed are whole numbers from 0 on"),
        ("[]", "not a dsv4 cache state"),
    ):
        with pytest.raises(ValueError, match=words):
            Snapshot.from_bytes(safetensors.torch.save(fields, {"dsv4 cache state": about}))


def test_wrong_fields_are_refused() -> None:
    metadata = {"dsv4 cache state": '{"version": 1, "length": 5}'}
    fields = filled().snapshot(1).fields()
    for change, words in (
        ({"layers.9.window": torch.ones(1)}, "wrong fields: layers.9.window"),
        ({"layers.1.main.kv": None}, "wrong fields: layers.1.main lacks kv"),
        ({"layers.0.window": None}, "wrong fields: "),
    ):
        changed = {name: t for name, t in (fields | change).items() if t is not None}
        with pytest.raises(ValueError, match=words):
            Snapshot.from_bytes(safetensors.torch.save(changed, metadata))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (filled(tiny_config(schedule=(0, 4, 128), head_dim=48)), r"layers.0.window is \[128, 48\] of torch.float32"),
        (filled(dtype=torch.bfloat16), r"layers.0.window is \[128, 32\] of torch.bfloat16, in this cache .*float32"),
        (filled(tiny_config(schedule=(0, 128, 4))), r"layers.1.main.kv is \[128, 32\] of .*, in this cache \[8, 64\]"),
        (filled(tiny_config(schedule=(0, 4))), "layers.2.main.kv is missing, in this cache"),
        (filled(tiny_config(schedule=(0, 4, 128, 0))), "layers.4.window is .*, in this cache missing"),
    ],
)
def test_a_snapshot_of_another_model_is_refused_and_nothing_is_written(other: Cache, words: str) -> None:
    cache = filled()
    before = cache.snapshot(1)
    with pytest.raises(ValueError, match=f"snapshot of another model: {words}"):
        cache.restore(1, other.snapshot(1))
    assert cache.lengths[1] == 5
    assert all(torch.equal(t, before.fields()[name]) for name, t in cache.snapshot(1).fields().items())


def test_a_snapshot_without_its_pages_is_refused() -> None:
    cache = filled()
    with pytest.raises(ValueError, match="snapshot of 5 tokens: cache row 0 has 0 of their 1 pages; share them first"):
        cache.restore(0, cache.snapshot(1))


def test_state_is_as_wide_as_the_layer_kind_says() -> None:
    for ratio, kind in COMPRESSION_KINDS.items():
        layer = new_layer(CONFIG, kind, 2, 3, CPU, torch.float32)
        assert len(layer.compressors()) == bool(ratio) + kind.has_indexer
        for compressor, width in zip(layer.compressors(), (CONFIG.head_dim, CONFIG.index_head_dim), strict=False):
            assert compressor.kv.shape == (2, kind.state_tokens, kind.channels(width))
            assert compressor.entries.shape == (3 * 128 // ratio + 1, width)
