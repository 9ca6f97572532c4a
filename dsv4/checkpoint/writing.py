"""Write a model folder: official FP4 or FP8, plain BF16 or FP32, or as transformers saves it; tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from dsv4.analysis.inventory import Layout, TensorSpec, tensor_inventory
from dsv4.checkpoint import formats, names
from dsv4.checkpoint.errors import CheckpointError
from dsv4.checkpoint.files import TORCH_DTYPES, Progress, ShardWriter, copy_file, new_folder, refuse_source, write_json
from dsv4.checkpoint.folder import LOADED_SCALES, Checkpoint
from dsv4.checkpoint.shards import INDEX_NAME
from dsv4.config import ModelConfig
from dsv4.kernels.stored import widened

Format = Literal["official", "official-base", "bf16", "fp32", "transformers"]
FORMATS: tuple[Format, ...] = get_args(Format)
MAX_SHARD_BYTES = 5 * 10**9

# The stored tensors of one parameter: the weight, and its scales where it is quantised.
Group = list[TensorSpec]


def save_model(
    model: nn.Module | Mapping[str, Tensor],
    config: ModelConfig,
    path: str | Path,
    format: Format = "official",
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Write a model, or its tensors by official name, as a folder at `path` that appears whole or not at all.

    "transformers" is BF16 if the embedding is, else FP32. `overwrite` replaces the whole folder, tokenizer included.
    """
    _check_format(format)
    tensors: Mapping[str, Tensor] = model.state_dict() if isinstance(model, nn.Module) else model
    target = Path(path)
    _check_tensors(tensors, config, target)
    # A model has these if it was loaded; see reading.
    scales: dict[str, Tensor] = getattr(model, LOADED_SCALES, {})
    plain: Layout = "bf16" if tensors["embed.weight"].dtype == torch.bfloat16 else "fp32"

    def encode(group: Group) -> list[Tensor]:
        name = group[0].name
        return _encode(group, tensors[name], target, scales.get(name))

    _write(target, config, format, plain, encode, {}, max_shard_bytes, overwrite)


def convert(
    src: str | Path,
    dst: str | Path,
    format: Format,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Rewrite a model folder in another format, tensor by tensor; equal formats copy codes and scales bit for bit.

    FP4 experts become FP8 exactly or CheckpointError says which tensor cannot. "transformers" is BF16, or FP32 where
    BF16 would change values (F32 scales or weights). The tokenizer and other small files come along.
    progress: told of the bytes of tensors written, and of all.
    """
    _check_format(format)
    with Checkpoint(src) as source:
        refuse_source(source.folder, Path(dst))
        many_bits = source.layout == "fp32" or (source.layout == "official-base" and source.scale_dtype == "F32")
        plain: Layout = "fp32" if many_bits else "bf16"

        def encode(group: Group) -> list[Tensor]:
            return _recode(group, source, format)

        extras = {file.name: file for file in sorted(source.folder.iterdir()) if _is_extra(file)}
        _write(Path(dst), source.config, format, plain, encode, extras, max_shard_bytes, overwrite, progress)


def _check_format(format: str) -> None:
    if format not in FORMATS:
        raise ValueError(f"format {format!r} is unknown; allowed: {', '.join(FORMATS)}")


def _check_tensors(tensors: Mapping[str, Tensor], config: ModelConfig, target: Path) -> None:
    expected = {spec.name: spec for spec in tensor_inventory(config, "fp32")}
    for name, spec in expected.items():
        wanted = f"{'int64' if spec.dtype == 'I64' else 'float'} {list(spec.shape)}"
        if name not in tensors:
            raise CheckpointError(target, wanted, "no such tensor to save", name)
        tensor = tensors[name]
        right_dtype = tensor.dtype == torch.int64 if spec.dtype == "I64" else tensor.dtype.is_floating_point
        if tuple(tensor.shape) != spec.shape or not right_dtype:
            raise CheckpointError(target, wanted, f"{tensor.dtype} {list(tensor.shape)}", name)
    for name in tensors:
        if name not in expected:
            raise CheckpointError(target, "no tensor of that name in this model", "one to save", name)


def _encode(group: Group, tensor: Tensor, place: Path, keep: Tensor | None = None) -> list[Tensor]:
    """Values of one parameter -> its stored tensors, in the order of `group`; `keep` as in formats.quantize_fp8."""
    spec, tensor = group[0], widened(tensor)
    try:
        if spec.dtype == "I8":
            return list(formats.quantize_fp4(tensor, keep))
        if spec.dtype == "F8_E4M3":
            return list(formats.quantize_fp8(tensor, TORCH_DTYPES[group[1].dtype], keep))
    except ValueError as error:
        raise CheckpointError(place, f"values that {spec.dtype} can hold", str(error), spec.name) from error
    # Integer tables are never cast: ShardWriter refuses another dtype.
    return [tensor if spec.dtype == "I64" else tensor.to(TORCH_DTYPES[spec.dtype])]


def _recode(group: Group, source: Checkpoint, format: Format) -> list[Tensor]:
    spec = group[0]
    raw, scales = source.stored(spec.name), source.scale(spec.name)
    if len(group) == 1 or scales is None:
        return _encode(group, source.parameter(spec.name), source.place(spec.name)[0])
    scale_dtype = TORCH_DTYPES[group[1].dtype]
    if source.layout == format and scales.dtype == scale_dtype:
        return [raw, scales]
    if spec.dtype == "F8_E4M3" and raw.dtype == torch.int8:
        file, name = source.place(spec.name)
        try:
            return list(formats.fp4_to_fp8(raw, scales, scale_dtype))
        except ValueError as error:
            raise CheckpointError(file, "FP4 values with an exact FP8 form", str(error), name) from error
    return _encode(group, source.parameter(spec.name), source.place(spec.name)[0])


def _is_extra(file: Path) -> bool:
    weights = file.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf")
    return file.is_file() and not weights and file.name not in ("config.json", INDEX_NAME) and file.name[0] != "."


def _write(
    target: Path,
    config: ModelConfig,
    format: Format,
    plain: Layout,
    encode: Callable[[Group], list[Tensor]],
    extras: Mapping[str, Path],
    max_shard_bytes: int,
    overwrite: bool,
    progress: Progress | None = None,
) -> None:
    layout = plain if format == "transformers" else format
    rename = names.to_transformers if format == "transformers" else str
    shards = list(_plan(tensor_inventory(config, layout), max_shard_bytes))
    done, total = 0, sum(spec.num_bytes for groups in shards for group in groups for spec in group)
    weight_map: dict[str, str] = {}
    with new_folder(target, overwrite) as folder:
        for number, groups in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            specs = [spec._replace(name=rename(spec.name)) for group in groups for spec in group]
            weight_map |= {spec.name: file for spec in specs}
            with ShardWriter(folder / file, specs) as shard:
                for group in groups:
                    for spec, tensor in zip(group, encode(group), strict=True):
                        shard.write(rename(spec.name), tensor)
                        done += spec.num_bytes
                    if progress is not None:
                        progress(done, total)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / INDEX_NAME, index)
        write_json(folder / "config.json", _config_json(config, layout))
        for name, file in extras.items():
            copy_file(file, folder / name)


def _plan(specs: Iterator[TensorSpec], max_shard_bytes: int) -> Iterator[list[Group]]:
    """Cut the tensors, in order, into shards of at most `max_shard_bytes`; a weight and its scales stay together."""
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes = {max_shard_bytes} is not allowed; allowed: 1 or more")
    shard: list[Group] = []
    size = 0
    for _, members in groupby(specs, key=lambda spec: spec.name.removesuffix(".scale").removesuffix(".weight")):
        group = list(members)
        group_size = sum(spec.num_bytes for spec in group)
        if shard and size + group_size > max_shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(group)
        size += group_size
    yield shard


def _config_json(config: ModelConfig, layout: Layout) -> dict[str, Any]:
    if layout in ("official", "official-base"):
        return replace(config, expert_dtype="fp4" if layout == "official" else "fp8").to_dict()
    content = config.to_dict(quantized=False)
    return {**content, "torch_dtype": "float32" if layout == "fp32" else "bfloat16"}
