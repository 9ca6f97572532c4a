"""Writing: the same bytes after reading back, shards and index, conversion between all layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dsv4.analysis import checkpoint_bytes, tensor_inventory
from dsv4.checkpoint import (
    FORMATS,
    CheckpointError,
    convert,
    iter_float_tensors,
    load_model,
    read_config,
    save_model,
    save_tensors,
)
from dsv4.config import ModelConfig

OFFICIAL_NAMES = ["official", "official-base", "bf16", "fp32"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.fixture(scope="module")
def trained(tiny: Any, tiny_config: ModelConfig) -> dict[str, torch.Tensor]:
    """Weights as after training: float32 values that no narrower format can hold."""
    return tiny(tiny_config, "fp32", seed=7).values


@pytest.mark.parametrize("format", FORMATS)
def test_write_read_write_gives_the_same_bytes(
    format: Any, trained: dict[str, torch.Tensor], tiny_config: ModelConfig, tmp_path: Path
) -> None:
    save_model(trained, tiny_config, tmp_path / "first", format, max_shard_bytes=300_000)
    model = load_model(tmp_path / "first")
    save_model(model, model.config, tmp_path / "second", format, max_shard_bytes=300_000)
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    convert(tmp_path / "first", tmp_path / "third", format, max_shard_bytes=300_000)
    assert contents(tmp_path / "first") == contents(tmp_path / "third")


@pytest.mark.parametrize("layout", OFFICIAL_NAMES)
def test_tensors_that_come_one_at_a_time_make_the_same_files(
    layout: Any, trained: dict[str, torch.Tensor], tiny_config: ModelConfig, tmp_path: Path
) -> None:
    save_model(trained, tiny_config, tmp_path / "whole", layout, max_shard_bytes=300_000)
    stream = ((spec.name, trained[spec.name]) for spec in tensor_inventory(tiny_config, "fp32"))
    save_tensors(stream, tiny_config, tmp_path / "stream", layout, max_shard_bytes=300_000)
    assert contents(tmp_path / "stream") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors[:-1], "head.weight.*found None in its place"),
        (lambda tensors: tensors[::-1], "embed.weight.*found head.weight in its place"),
        (lambda tensors: [*tensors, tensors[0]], "embed.weight.*no more tensors"),
        (lambda tensors: [(tensors[0][0], tensors[0][1][1:]), *tensors[1:]], "embed.weight.*expected float"),
    ],
)
def test_other_tensors_than_the_models_in_their_order_are_refused(
    change: Any, said: str, trained: dict[str, torch.Tensor], tiny_config: ModelConfig, tmp_path: Path
) -> None:
    tensors = [(spec.name, trained[spec.name]) for spec in tensor_inventory(tiny_config, "fp32")]
    with pytest.raises(CheckpointError, match=said):
        save_tensors(change(tensors), tiny_config, tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", OFFICIAL_NAMES)
def test_written_folder_holds_the_inventory(
    layout: Any, trained: dict[str, torch.Tensor], tiny_config: ModelConfig, tmp_path: Path
) -> None:
    """Read with the safetensors library: names, shapes and dtypes, the shard limit, the index."""
    save_model(trained, tiny_config, tmp_path / "model", layout, max_shard_bytes=300_000)
    expected = {spec.name: (list(spec.shape), spec.dtype) for spec in tensor_inventory(tiny_config, layout)}
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == checkpoint_bytes(tiny_config, layout)
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
    ]
    found: dict[str, tuple[list[int], str]] = {}
    for file in files:
        with safe_open(file, framework="pt") as shard:
            assert shard.metadata() == {"format": "pt"}
            size = 0
            for name in shard.keys():  # noqa: SIM118
                part = shard.get_slice(name)
                found[name] = (part.get_shape(), part.get_dtype())
                size += shard.get_tensor(name).nbytes
                assert index["weight_map"][name] == file.name
            assert size <= 300_000
    assert found == expected and index["weight_map"].keys() == expected.keys()
    assert len(files) >= 3
    for name in [name for name in expected if name.endswith(".scale")]:
        assert index["weight_map"][name] == index["weight_map"][name.replace("scale", "weight")]


def test_data_is_aligned_for_mapping(
    trained: dict[str, torch.Tensor], tiny_config: ModelConfig, tmp_path: Path
) -> None:
    save_model(trained, tiny_config, tmp_path / "model", "official-base")
    (file,) = (tmp_path / "model").glob("*.safetensors")
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    width = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "I64": 8}
    places = [(e["data_offsets"], width[e["dtype"]]) for name, e in header.items() if name != "__metadata__"]
    assert length % 8 == 0 and all(start % size == 0 for (start, _), size in places)


def test_an_independent_checkpoint_is_copied_bit_for_bit(official: Any, official_folder: Path, tmp_path: Path) -> None:
    """Including codes and scales that our own writer would encode differently."""
    convert(official_folder, tmp_path / "copy", "official", max_shard_bytes=250_000)
    copied = tensors_of(tmp_path / "copy")
    assert copied.keys() == official.stored.keys()
    assert all(same_bits(copied[name], tensor) for name, tensor in official.stored.items())
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (official_folder / name).read_bytes()
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert config == json.loads((official_folder / "config.json").read_text())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["official", "official-base"])
def test_saving_a_loaded_model_gives_the_same_tensors(
    layout: Any, dtype: torch.dtype, tiny: Any, tiny_config: ModelConfig, tmp_path: Path
) -> None:
    """Bit for bit, from a folder with another writer's codes and scales, one all-zero block included."""
    source = tiny(tiny_config, layout, seed=4)
    source.stored["layers.1.attn.wkv.weight"].view(torch.uint8).zero_()
    model = load_model(source.write(tmp_path / "model"), dtype=dtype)
    save_model(model, model.config, tmp_path / "again", layout)
    again = tensors_of(tmp_path / "again")
    assert again.keys() == source.stored.keys()
    assert all(same_bits(again[name], tensor) for name, tensor in source.stored.items())


def test_without_remembered_scales_every_value_is_kept(
    official: Any, tiny: Any, tiny_config: ModelConfig, tmp_path: Path
) -> None:
    """Without the remembered scales the encoding may change, but not the values; for Base not even the codes."""
    for source in (official, tiny(tiny_config, "official-base", seed=4)):
        save_model(source.values, source.config, tmp_path / source.layout, source.layout)
        for name, tensor in iter_float_tensors(tmp_path / source.layout):
            assert torch.equal(tensor.to(source.values[name].dtype), source.values[name]), name
        codes = tensors_of(tmp_path / source.layout)
        if source.layout == "official-base":
            fp8 = [name for name, tensor in source.stored.items() if tensor.dtype == torch.float8_e4m3fn]
            assert all(same_bits(codes[name], source.stored[name]) for name in fp8)


def test_remembered_scales_give_way_to_new_values(official: Any, official_folder: Path, tmp_path: Path) -> None:
    model = load_model(official_folder, weights="widened")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.7)
    save_model(model, model.config, tmp_path / "trained")
    save_model(model.state_dict(), model.config, tmp_path / "expected")
    assert contents(tmp_path / "trained") == contents(tmp_path / "expected")


@pytest.mark.parametrize("format", ["official-base", "bf16", "fp32", "transformers"])
def test_official_converts_exactly(format: Any, official: Any, official_folder: Path, tmp_path: Path) -> None:
    convert(official_folder, tmp_path / "other", format)
    for name, tensor in iter_float_tensors(tmp_path / "other"):
        assert torch.equal(tensor.to(official.values[name].dtype), official.values[name]), name
    assert (tmp_path / "other" / "tokenizer.json").is_file()
    raw = json.loads((tmp_path / "other" / "config.json").read_text())
    assert raw.get("expert_dtype") == ("fp8" if format == "official-base" else None)
    assert ("quantization_config" in raw) == (format == "official-base")
    assert raw["torch_dtype"] == ("float32" if format == "fp32" else "bfloat16")
    convert(tmp_path / "other", tmp_path / "back", "official")
    for name, tensor in iter_float_tensors(tmp_path / "back"):
        assert torch.equal(tensor.to(official.values[name].dtype), official.values[name]), name
    assert read_config(tmp_path / "back") == official.config


def test_transformers_format_is_float32_where_bf16_would_round(
    tiny: Any, tiny_config: ModelConfig, tmp_path: Path
) -> None:
    for layout, expected in (("official-base", torch.float32), ("fp32", torch.float32), ("bf16", torch.bfloat16)):
        folder = tiny(tiny_config, layout).write(tmp_path / layout)
        convert(folder, tmp_path / f"{layout}-hf", "transformers")
        assert tensors_of(tmp_path / f"{layout}-hf")["model.layers.1.attn.wq_a.weight"].dtype == expected


def test_mtp_is_written_in_every_format(
    trained: dict[str, torch.Tensor], tiny_config: ModelConfig, tmp_path: Path
) -> None:
    for format in FORMATS:
        save_model(trained, tiny_config, tmp_path / format, format)
        mtp = {name for name in tensors_of(tmp_path / format) if name.startswith("mtp.0.")}
        assert {name for name in trained if name.startswith("mtp.")} <= mtp
        assert len(load_model(tmp_path / format).mtp) == 1


def test_integer_tables_are_never_cast(
    trained: dict[str, torch.Tensor], tiny_config: ModelConfig, tmp_path: Path
) -> None:
    table = "layers.0.ffn.gate.tid2eid"
    for format in FORMATS:
        save_model(trained, tiny_config, tmp_path / format, format)
        name = f"model.{table}" if format == "transformers" else table
        assert same_bits(tensors_of(tmp_path / format)[name], trained[table])


def test_model_and_its_tensors_save_alike_in_bf16_too(official_folder: Path, tmp_path: Path) -> None:
    """A BF16 model holds the official values exactly, so it saves to the same bytes as the float32 one."""
    for name, dtype in (("wide", torch.float32), ("short", torch.bfloat16)):
        model = load_model(official_folder, dtype=dtype)
        save_model(model, model.config, tmp_path / name)
        save_model(model.state_dict(), model.config, tmp_path / f"{name}-tensors")
    assert contents(tmp_path / "short") == contents(tmp_path / "wide")
    assert contents(tmp_path / "short-tensors") == contents(tmp_path / "wide-tensors")


def test_progress_counts_the_bytes_of_the_tensors(
    trained: dict[str, torch.Tensor], tiny_config: ModelConfig, tmp_path: Path
) -> None:
    save_model(trained, tiny_config, tmp_path / "model")
    seen: list[tuple[int, int]] = []
    convert(tmp_path / "model", tmp_path / "out", "bf16", progress=lambda done, total: seen.append((done, total)))
    size = checkpoint_bytes(tiny_config, "bf16")
    assert seen[-1] == (size, size) and seen == sorted(set(seen)) and len(seen) > 100


def test_overwrite_replaces_the_folder(
    trained: dict[str, torch.Tensor], tiny_config: ModelConfig, tmp_path: Path
) -> None:
    save_model(trained, tiny_config, tmp_path / "model", "fp32", max_shard_bytes=300_000)
    save_model(trained, tiny_config, tmp_path / "model", "official", overwrite=True)
    save_model(trained, tiny_config, tmp_path / "fresh", "official")
    assert contents(tmp_path / "model") == contents(tmp_path / "fresh")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fresh", "model"]
    (tmp_path / "empty").mkdir()
    save_model(trained, tiny_config, tmp_path / "empty")
    assert contents(tmp_path / "empty") == contents(tmp_path / "fresh")


def test_a_conversion_holds_one_tensor_at_a_time(
    tiny: Any, tiny_config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two dequantized tensors are never alive at the same time."""
    import weakref

    from dsv4.checkpoint.folder import Checkpoint

    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    original = Checkpoint.parameter

    def watched(self: Checkpoint, name: str, device: Any = "cpu") -> torch.Tensor:
        nonlocal most
        most = max(most, sum(ref() is not None for ref in alive))
        tensor = original(self, name, device)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(Checkpoint, "parameter", watched)
    convert(tiny(tiny_config, "official").write(tmp_path / "model"), tmp_path / "plain", "fp32")
    assert len(alive) > 100 and most <= 1
