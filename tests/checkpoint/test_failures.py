"""Every defect of a folder is one CheckpointError with file, tensor, expected and found content."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import dsv4
from dsv4.checkpoint import CheckpointError, convert, iter_float_tensors, load_model, read_config, save_model
from dsv4.config import ModelConfig

WQ_A = "layers.1.attn.wq_a.weight"
EXPERT = "layers.2.ffn.experts.3.w2.weight"
TABLE = "layers.0.ffn.gate.tid2eid"
INDEX = "model.safetensors.index.json"

Change = Callable[[dict[str, torch.Tensor]], None]


def shard_of(folder: Path, tensor: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][tensor]


def rewrite(file: Path, change: Change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / INDEX).read_text())
    change(content)
    (folder / INDEX).write_text(json.dumps(content))


def add(folder: Path, file: Path, name: str, tensor: torch.Tensor) -> None:
    """Add a tensor, with its entry in the index and the total size."""
    rewrite(file, lambda tensors: tensors.update({name: tensor}))
    size = tensor.numel() * tensor.element_size()

    def entry(content: dict[str, Any]) -> None:
        content["weight_map"][name] = file.name
        content["metadata"]["total_size"] += size

    edit_index(folder, entry)


def fails(folder: Path, file: Path, tensor: str | None, expected: str, found: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        load_model(folder)
    error = raised.value
    assert (error.file, error.tensor) == (file, tensor)
    assert re.search(expected, error.expected), error.expected
    assert re.search(found, error.found), error.found
    for part in (str(file), error.expected, error.found, *([repr(tensor)] if tensor else [])):
        assert part in str(error)


def test_the_public_name_is_this_error() -> None:
    assert dsv4.CheckpointError is CheckpointError


@pytest.mark.parametrize(
    "name", [WQ_A, "layers.1.attn.wq_a.scale", EXPERT, TABLE, "mtp.0.hnorm.weight", "hc_head_base"]
)
def test_a_missing_tensor_is_named(name: str, official_folder: Path) -> None:
    rewrite(shard_of(official_folder, name), lambda tensors: [tensors.pop(name)])  # type: ignore[arg-type]

    def entry(content: dict[str, Any]) -> None:
        del content["weight_map"][name], content["metadata"]

    edit_index(official_folder, entry)
    fails(official_folder, official_folder, name, r"\[\d+", r"no such tensor \(1 of \d+ are missing\)")


def test_an_unexpected_tensor_is_named(official_folder: Path) -> None:
    file = shard_of(official_folder, WQ_A)
    add(official_folder, file, "layers.9.attn.wq_a.weight", torch.zeros(2, 3))
    fails(official_folder, file, "layers.9.attn.wq_a.weight", "no tensor of that name", r"F32 \[2, 3\] \(1 unexpected")


@pytest.mark.parametrize(
    ("name", "change", "expected", "found"),
    [
        (WQ_A, lambda t: t[:-1], r"F8_E4M3 \[40, 160\]", r"F8_E4M3 \[39, 160\]"),
        (WQ_A, lambda t: t.float().bfloat16(), r"F8_E4M3 \[40, 160\]", r"BF16 \[40, 160\]"),
        ("layers.1.attn.wq_a.scale", lambda t: t.float(), r"F8_E8M0 \[1, 2\]", r"F32 \[1, 2\]"),
        ("layers.1.attn.wq_a.scale", lambda t: t[:, :1].clone(), r"F8_E8M0 \[1, 2\]", r"F8_E8M0 \[1, 1\]"),
        (EXPERT, lambda t: t.view(torch.uint8), r"I8 \[160, 24\]", r"U8 \[160, 24\]"),
        (EXPERT, lambda t: torch.zeros(160, 48, dtype=torch.bfloat16), r"I8 \[160, 24\]", r"BF16 \[160, 48\]"),
        (TABLE, lambda t: t.int(), r"I64 \[67, 2\]", r"I32 \[67, 2\]"),
        ("layers.1.attn_norm.weight", lambda t: t.float(), r"BF16 \[160\]", r"F32 \[160\]"),
        ("layers.1.ffn.gate.bias", lambda t: t.bfloat16(), r"F32 \[5\]", r"BF16 \[5\]"),
    ],
)
def test_a_misshapen_or_mistyped_tensor_is_named(
    name: str, change: Any, expected: str, found: str, official_folder: Path
) -> None:
    file = shard_of(official_folder, name)
    rewrite(file, lambda tensors: tensors.update({name: change(tensors[name]).contiguous()}))
    edit_index(official_folder, lambda content: content.pop("metadata"))
    fails(official_folder, file, name, expected, found)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_experts_that_all_have_another_dtype_are_refused(
    dtype: torch.dtype, tiny: Any, tiny_config: ModelConfig, tmp_path: Path
) -> None:
    """The error names an expert, not the first tensor that a folder without quantized weights would lack."""
    source = tiny(tiny_config, "official")
    for name, tensor in source.stored.items():
        if tensor.dtype == torch.int8:
            source.stored[name] = tensor.view(torch.uint8).to(dtype)
    folder, name = source.write(tmp_path / "model"), "layers.0.ffn.experts.0.w1.weight"
    found = {torch.uint8: "U8", torch.int32: "I32"}[dtype]
    expected = r"I8 \[48, 80\], FP4 packed two to a byte"
    fails(folder, shard_of(folder, name), name, expected, rf"{found} \[48, 80\]")


def test_integers_where_a_plain_folder_should_have_floats_are_refused(
    tiny: Any, tiny_config: ModelConfig, tmp_path: Path
) -> None:
    source = tiny(tiny_config, "bf16")
    source.stored[WQ_A] = source.stored[WQ_A].int()
    folder = source.write(tmp_path / "model")
    fails(folder, shard_of(folder, WQ_A), WQ_A, r"BF16 or F32 or F16 \[40, 160\]", "I32")
    source.stored[TABLE] = source.stored[TABLE].float()
    source.stored[WQ_A] = source.stored[WQ_A].float()
    folder = source.write(tmp_path / "other")
    fails(folder, shard_of(folder, TABLE), TABLE, r"I64 \[67, 2\]", "F32")


def test_one_base_scale_of_another_dtype_is_refused(tiny: Any, tiny_config: ModelConfig, tmp_path: Path) -> None:
    source = tiny(replace(tiny_config, expert_dtype="fp8"), "official-base")
    name = EXPERT.replace("weight", "scale")
    source.stored[name] = source.stored[name].to(torch.float8_e8m0fnu)
    folder = source.write(tmp_path / "model")
    fails(folder, shard_of(folder, name), name, r"F32 \[2, 1\]", "F8_E8M0")


def test_a_tensor_in_two_shards_is_refused(official_folder: Path, official: Any) -> None:
    first, other = shard_of(official_folder, "embed.weight"), shard_of(official_folder, "mtp.0.norm.weight")
    assert first != other
    rewrite(other, lambda tensors: tensors.update({"embed.weight": official.stored["embed.weight"]}))
    fails(official_folder, other, "embed.weight", f"only in {first.name}", "duplicate")


def test_a_tensor_under_two_names_is_refused(official_folder: Path, official: Any) -> None:
    file = shard_of(official_folder, "head.weight")
    add(official_folder, file, "lm_head.weight", official.stored["head.weight"])
    fails(official_folder, file, "lm_head.weight", "head.weight once", "duplicate")


def test_a_name_twice_in_one_header_is_refused(tiny: Any, tiny_config: ModelConfig, tmp_path: Path) -> None:
    folder = tiny(tiny_config, "official").write(tmp_path / "model", shards=0)
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length].rstrip()
    entry = re.search(rb'"norm\.weight":\{[^}]*\}', header)
    assert entry is not None
    header = header[:-1] + b"," + entry.group() + b"}"
    file.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])
    fails(folder, file, "norm.weight", "each tensor once", "2 of that name")


@pytest.mark.parametrize("cut", [1, 5000])
def test_a_truncated_shard_is_refused(cut: int, official_folder: Path) -> None:
    file = shard_of(official_folder, EXPERT)
    size = file.stat().st_size
    with file.open("r+b") as handle:
        handle.truncate(size - cut)
    fails(official_folder, file, None, "a whole safetensors file", f"{size - cut} bytes")


@pytest.mark.parametrize("content", [b"", b"no safetensors at all", (2**40).to_bytes(8, "little") + b"{}"])
def test_a_shard_that_is_no_safetensors_file_is_refused(content: bytes, official_folder: Path) -> None:
    file = shard_of(official_folder, EXPERT)
    file.write_bytes(content)
    fails(official_folder, file, None, "a whole safetensors file", f"{len(content)} bytes")


def test_a_missing_shard_is_named(official_folder: Path) -> None:
    file = shard_of(official_folder, "mtp.0.norm.weight")
    file.unlink()
    with pytest.raises(
        CheckpointError, match=f"{file.name}: tensor '.*': expected the shard that .* found no such file"
    ):
        load_model(official_folder)


def test_a_shard_that_the_index_does_not_list_is_refused(official_folder: Path) -> None:
    extra = official_folder / "model-00004-of-00004.safetensors"
    save_file({"more": torch.zeros(2)}, extra)
    fails(official_folder, extra, None, "only the shards that", "does not")


def test_an_index_that_names_another_shard_is_refused(official_folder: Path) -> None:
    right, wrong = shard_of(official_folder, "embed.weight"), shard_of(official_folder, "mtp.0.norm.weight")
    edit_index(official_folder, lambda content: content["weight_map"].update({"embed.weight": wrong.name}))
    index = official_folder / INDEX
    fails(official_folder, index, "embed.weight", f"weight_map to say {right.name}", wrong.name)


def test_an_index_entry_without_a_tensor_is_refused(official_folder: Path) -> None:
    file = shard_of(official_folder, "embed.weight")
    edit_index(official_folder, lambda content: content["weight_map"].update({"ghost": file.name}))
    fails(official_folder, file, "ghost", "as .* says", "no such tensor")


def test_an_index_that_leaves_a_tensor_out_is_refused(official_folder: Path) -> None:
    file = shard_of(official_folder, "embed.weight")
    edit_index(official_folder, lambda content: content["weight_map"].pop("embed.weight"))
    fails(official_folder, official_folder / INDEX, "embed.weight", f"weight_map to say {file.name}", "None")


@pytest.mark.parametrize("wrong", [1, "much", -3.5])
def test_a_wrong_total_size_is_only_a_warning(
    wrong: Any, official_folder: Path, official: Any, caplog: pytest.LogCaptureFixture
) -> None:
    total = sum(tensor.numel() * tensor.element_size() for tensor in official.stored.values())
    edit_index(official_folder, lambda content: content["metadata"].update(total_size=wrong))
    for _ in range(2):
        load_model(official_folder)
    assert [record.getMessage() for record in caplog.records if "total_size" in record.getMessage()] == [
        f"{official_folder / INDEX}: metadata.total_size is {wrong!r}, but the tensors have {total} bytes"
    ]


@pytest.mark.parametrize("shard", ["../model.safetensors", 3, None])
def test_an_index_that_names_no_file_beside_it_is_refused(shard: Any, official_folder: Path) -> None:
    edit_index(official_folder, lambda content: content["weight_map"].update({"embed.weight": shard}))
    fails(official_folder, official_folder / INDEX, "embed.weight", "a file beside the index", re.escape(repr(shard)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "valid JSON"),
        ("[1]", "a JSON object"),
        ("{}", "'weight_map'"),
        ('{"weight_map": 1}', "'weight_map'"),
        ("\udcff", "valid JSON"),
    ],
)
def test_a_bad_index_json_is_refused(text: str, expected: str, official_folder: Path) -> None:
    (official_folder / INDEX).write_bytes(text.encode(errors="surrogateescape"))
    fails(official_folder, official_folder / INDEX, None, expected, ".")


@pytest.mark.parametrize(
    ("text", "expected"), [("{", "valid JSON"), ("[]", "a JSON object"), ('{"hidden_size": 3}', "a DeepSeek V4 config")]
)
def test_a_bad_config_json_is_refused(text: str, expected: str, official_folder: Path) -> None:
    (official_folder / "config.json").write_text(text)
    fails(official_folder, official_folder / "config.json", None, expected, ".")
    with pytest.raises(CheckpointError):
        read_config(official_folder)


def test_a_key_twice_in_the_index_is_refused(official_folder: Path) -> None:
    index = official_folder / INDEX
    twice = f'"weight_map": {{"{WQ_A}": "other.safetensors",'
    index.write_text(re.sub(r'"weight_map":\s*\{', lambda _: twice, index.read_text()))
    fails(official_folder, index, WQ_A, "each key of an object once", "2 of that name")


def test_json_that_cannot_be_read_is_named(official_folder: Path) -> None:
    config = official_folder / "config.json"
    config.write_text("[" * 100_000)
    fails(official_folder, config, None, "valid JSON", "recursion")
    config.unlink()
    config.mkdir()
    fails(official_folder, config, None, "a readable JSON file", "directory")


def test_a_missing_config_folder_or_weight_is_named(official_folder: Path, tmp_path: Path) -> None:
    fails(tmp_path / "absent", tmp_path / "absent", None, "a model folder", "no such folder")
    config = official_folder / "config.json"
    fails(config, config, None, "a model folder", "a file")
    (official_folder / INDEX).unlink()
    fails(official_folder, official_folder, None, "model.safetensors", "3 other shards, 'model-00001-of-00003")
    for file in official_folder.glob("*.safetensors"):
        file.unlink()
    fails(official_folder, official_folder, None, "model.safetensors", "no weights")
    config.unlink()
    fails(official_folder, config, None, "a JSON file", "no such file")


def test_a_shard_that_changes_while_it_is_read_is_refused(official_folder: Path) -> None:
    from dsv4.checkpoint.folder import Checkpoint

    file = shard_of(official_folder, EXPERT)
    with Checkpoint(official_folder) as checkpoint:
        rewrite(file, lambda tensors: [tensors.pop(EXPERT)])  # type: ignore[arg-type]
        with pytest.raises(CheckpointError, match=f"{file.name}: tensor '{EXPERT}': expected the file as it was"):
            checkpoint.parameter(EXPERT)


def test_a_hash_table_with_an_invalid_expert_is_refused(tiny: Any, tiny_config: ModelConfig, tmp_path: Path) -> None:
    source = tiny(tiny_config, "official")
    source.stored[TABLE][66, 1] = 5
    folder = source.write(tmp_path / "model")
    fails(folder, shard_of(folder, TABLE), TABLE, "expert numbers from 0 to 4", "5")
    with pytest.raises(CheckpointError, match="expert numbers from 0 to 4"):
        list(iter_float_tensors(folder, names={TABLE}))


def test_tensors_of_another_config_are_counted_and_named(official_folder: Path) -> None:
    config = json.loads((official_folder / "config.json").read_text())
    (official_folder / "config.json").write_text(json.dumps({**config, "n_routed_experts": 6}))
    with pytest.raises(CheckpointError, match=r"layers\.0\.ffn\.experts\.5\.w1\.weight.*30 of 367"):
        load_model(official_folder)


def only(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_failed_conversion_leaves_nothing(tiny: Any, tiny_config: ModelConfig, tmp_path: Path) -> None:
    """Group scales too far apart for FP8: the error names the tensor, and the target does not exist."""
    source = tiny(tiny_config, "official")
    scale = source.stored[EXPERT.replace("weight", "scale")].view(torch.uint8)
    scale[0, 0], scale[0, 1] = 160, 60
    source.stored[EXPERT][0] = 0x17
    folder = source.write(tmp_path / "model")
    with pytest.raises(CheckpointError) as raised:
        convert(folder, tmp_path / "new" / "base", "official-base")
    assert raised.value.tensor == EXPERT and "2^14" in raised.value.found
    assert only(tmp_path) == ["model", "new"] and only(tmp_path / "new") == []


def test_a_failed_save_leaves_nothing_or_the_old_folder(official: Any, tmp_path: Path) -> None:
    tensors = dict(official.values)
    save_model(tensors, official.config, tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    tensors[EXPERT] = torch.full_like(tensors[EXPERT], float("nan"))
    for overwrite, target in ((True, "model"), (False, "other")):
        with pytest.raises(CheckpointError) as raised:
            save_model(tensors, official.config, tmp_path / target, overwrite=overwrite)
        assert raised.value.tensor == EXPERT and "NaN" in raised.value.found
    assert only(tmp_path) == ["model"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before


def test_an_interrupted_save_leaves_nothing(official: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dsv4.checkpoint import writing

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(writing, "write_json", interrupt)  # after all shards are written
    with pytest.raises(KeyboardInterrupt):
        save_model(official.values, official.config, tmp_path / "model")
    assert only(tmp_path) == []


def test_destinations_that_are_refused(official: Any, official_folder: Path, tmp_path: Path) -> None:
    before = {file.name: file.read_bytes() for file in official_folder.iterdir()}
    (tmp_path / "links").mkdir()
    for file in official_folder.iterdir():
        (tmp_path / "links" / file.name).symlink_to(file)
    with pytest.raises(CheckpointError, match="expected another folder than the source's"):
        convert(tmp_path / "links", official_folder, "bf16", overwrite=True)
    with pytest.raises(CheckpointError, match="no such folder"):
        convert(tmp_path / "missing", tmp_path, "bf16", overwrite=True)
    for target in (official_folder, official_folder.parent, official_folder / ".." / official_folder.name):
        with pytest.raises(CheckpointError, match="expected another folder than the source's"):
            convert(official_folder, target, "bf16", overwrite=True)
    assert {file.name: file.read_bytes() for file in official_folder.iterdir()} == before
    (tmp_path / "file").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match="expected the name of a folder; found a file"):
            convert(official_folder, tmp_path / "file", "bf16", overwrite=overwrite)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "important.txt").write_text("mine")
    with pytest.raises(
        CheckpointError, match="expected a new or empty folder .or --overwrite; in Python overwrite=True"
    ):
        convert(official_folder, tmp_path / "notes", "bf16")
    with pytest.raises(CheckpointError, match="a model folder to overwrite"):
        save_model(official.values, official.config, tmp_path / "notes", overwrite=True)
    assert (tmp_path / "notes" / "important.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="format 'gguf' is unknown; allowed: official, official-base, bf16, fp32"):
        convert(official_folder, tmp_path / "x", "gguf")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_shard_bytes = 0"):
        save_model(official.values, official.config, tmp_path / "x", max_shard_bytes=0)


@pytest.mark.parametrize(
    ("name", "tensor", "expected", "found"),
    [
        (WQ_A, None, r"float \[40, 160\]", "no such tensor"),
        (WQ_A, torch.zeros(40, 161), r"float \[40, 160\]", r"torch.float32 \[40, 161\]"),
        (TABLE, torch.zeros(67, 2), r"int64 \[67, 2\]", r"torch.float32"),
        (TABLE, torch.zeros(67, 2, dtype=torch.int32), r"int64 \[67, 2\]", r"torch.int32"),
        (WQ_A, torch.zeros(40, 160, dtype=torch.int64), r"float \[40, 160\]", r"torch.int64"),
        ("layers.7.x", torch.zeros(1), "no tensor of that name", "one to save"),
    ],
)
def test_tensors_that_cannot_be_saved_are_named(
    name: str, tensor: torch.Tensor | None, expected: str, found: str, official: Any, tmp_path: Path
) -> None:
    tensors = {**official.values, name: tensor}
    if tensor is None:
        del tensors[name]
    with pytest.raises(CheckpointError) as raised:
        save_model(tensors, official.config, tmp_path / "model")
    assert (raised.value.file, raised.value.tensor) == (tmp_path / "model", name)
    assert re.search(expected, raised.value.expected) and re.search(found, raised.value.found)
    assert only(tmp_path) == []
