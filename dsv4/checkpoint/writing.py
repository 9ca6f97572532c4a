"""Write a model folder: official FP4 or FP8, plain BF16 or FP32, or as transformers saves it; tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn

from dsv4.analysis.inventory import StorageLayout, TensorSpec, tensor_inventory
from dsv4.checkpoint import formats, names
from dsv4.checkpoint.adapter_files import Adapter
from dsv4.checkpoint.atomic import check_space, new_folder
from dsv4.checkpoint.errors import CheckpointError
from dsv4.checkpoint.files import TORCH_DTYPES, ShardWriter, WriteProgress, copy_file, refuse_source, write_json
from dsv4.checkpoint.folder import Checkpoint
from dsv4.checkpoint.mapped import LOADED_SCALES, LoadedScales, MappedFiles
from dsv4.checkpoint.rounding import Rounding, RoundingError
from dsv4.checkpoint.shards import INDEX_NAME
from dsv4.checkpoint.values import check_values, first_not_finite
from dsv4.config import ModelConfig
from dsv4.kernels.stored import StoredTensor, widened
from dsv4.model.stacks import official_tensors

Format = Literal["official", "official-base", "bf16", "fp32", "transformers"]
FORMATS: tuple[Format, ...] = get_args(Format)
MAX_SHARD_BYTES = 5 * 10**9

# Stored tensors of one parameter: the weight, and its scales if it is quantized.
Group = list[TensorSpec]


def save_model(
    model: nn.Module | Mapping[str, Tensor],
    config: ModelConfig,
    path: str | Path,
    format: Format = "official",
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    extras: Iterable[Path] = (),
) -> None:
    """Write a model, or its tensors by module or official name, as a folder at `path` that appears whole or not at all.

    "transformers" is BF16 if the embedding is, else FP32. `overwrite` replaces the whole folder, tokenizer included.
    extras: files to copy into it, such as a tokenizer's.
    CheckpointError names a tensor with NaN or infinity, DiskFullError the target that did not fit.
    """
    _check_format(format)
    tensors = official_tensors(model.state_dict() if isinstance(model, nn.Module) else model)
    target = Path(path)
    _check_names(tensors, config, target)
    # Present on a loaded model; see reading.py.
    scales: LoadedScales | dict[str, Tensor] = getattr(model, LOADED_SCALES, {})
    plain: StorageLayout = "bf16" if tensors["embed.weight"].dtype == torch.bfloat16 else "fp32"

    def encode(group: Group) -> list[Tensor]:
        name = group[0].name
        tensor, keep = tensors[name], scales.get(name)
        if keep is not None and isinstance(tensor, StoredTensor):
            dtypes = [TORCH_DTYPES[spec.dtype] for spec in group]
            if [tensor.codes.dtype, keep.dtype] == dtypes:
                return [tensor.codes, keep]  # as it was read
        return _encode(group, tensor, target, keep)

    _write(target, config, format, plain, encode, extras, max_shard_bytes, overwrite)


def save_tensors(
    tensors: Iterable[tuple[str, Tensor]],
    config: ModelConfig,
    path: str | Path,
    format: StorageLayout = "official",
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    extras: Iterable[Path] = (),
) -> None:
    """As save_model, of tensors by official name that come one at a time, in the order of `tensor_inventory`."""
    target, stream = Path(path), iter(tensors)
    expected = {spec.name: spec for spec in tensor_inventory(config, "fp32")}

    def encode(group: Group) -> list[Tensor]:
        name, tensor = next(stream, (None, None))
        spec = expected[group[0].name]
        if tensor is None or name != spec.name:
            raise CheckpointError(target, "the tensors of the model in their order", f"{name} in its place", spec.name)
        _check_tensor(spec, tensor, target)
        return _encode(group, tensor, target)

    def check_end() -> None:
        for name, _ in stream:
            raise CheckpointError(target, "no more tensors in this model", "one to save", name)

    _write(target, config, format, format, encode, extras, max_shard_bytes, overwrite, check_source=check_end)


def convert(
    src: str | Path,
    dst: str | Path,
    format: Format,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    allow_rounding: bool = False,
    progress: WriteProgress | None = None,
    adapter: str | Path | None = None,
) -> dict[str, RoundingError]:
    """Rewrite a model folder in another format, tensor by tensor; equal formats copy codes and scales bit for bit.

    No value changes unless `allow_rounding` (as when Base's FP8 experts become FP4, or F32 becomes BF16):
    CheckpointError names the first tensor in which one would change, or one with NaN or infinity. "transformers" is
    BF16, or FP32 if BF16 would change values (F32 scales or weights). The tokenizer and other small files are copied.
    DiskFullError names the target that did not fit. progress: called with the tensor bytes written so far and in all.
    adapter: folder of a LoRA adapter to merge into the weights; the matrices that it changes are rounded to the format.
    Returns the rounding errors, by kind of tensor; empty if no value changed.
    """
    _check_format(format)
    rounding = Rounding(allow_rounding)
    with Checkpoint(src) as source:
        refuse_source(source.folder, Path(dst))
        files = MappedFiles(source)
        plain: StorageLayout = "fp32" if _has_many_bits(source) else "bf16"
        merged = Adapter(adapter, source.config) if adapter is not None else None

        def encode(group: Group) -> list[Tensor]:
            check_values(source, group[0].name)
            if merged is not None and group[0].name in merged.names:
                return _merge(group, source, merged, rounding)
            return _recode(group, source, format, rounding)

        extras = [file for file in sorted(source.folder.iterdir()) if _is_extra(file)]
        _write(
            Path(dst), source.config, format, plain, encode, extras, max_shard_bytes, overwrite, progress, files.check
        )
    return rounding.errors


def stored_format(path: str | Path) -> Format:
    """Format in which a model folder is stored; "bf16" or "fp32" if transformers wrote it."""
    with Checkpoint(path) as source:
        return cast(Format, source.layout)


def _has_many_bits(source: Checkpoint) -> bool:
    """True if a tensor that the official layout stores in 16 bits or less may have values that BF16 cannot hold."""
    if source.layout != "bf16":
        return source.layout == "fp32" or (source.layout == "official-base" and source.scale_dtype == "F32")
    specs = tensor_inventory(source.config, "bf16")
    return any(spec.dtype == "BF16" and source.stored(spec.name).dtype != torch.bfloat16 for spec in specs)


def _check_format(format: str) -> None:
    if format not in FORMATS:
        raise ValueError(f"format {format!r} is unknown; allowed: {', '.join(FORMATS)}")


def _check_names(tensors: Mapping[str, Tensor], config: ModelConfig, target: Path) -> None:
    """CheckpointError unless `tensors` are those of the model, of the right shape and kind; names the first."""
    expected = {spec.name: spec for spec in tensor_inventory(config, "fp32")}
    for name, spec in expected.items():
        if name not in tensors:
            raise CheckpointError(target, _wanted(spec), "no such tensor to save", name)
        _check_tensor(spec, tensors[name], target)
    for name in tensors:
        if name not in expected:
            raise CheckpointError(target, "no tensor of that name in this model", "one to save", name)


def _check_tensor(spec: TensorSpec, tensor: Tensor, target: Path) -> None:
    right_dtype = tensor.dtype == torch.int64 if spec.dtype == "I64" else tensor.dtype.is_floating_point
    if tuple(tensor.shape) != spec.shape or not right_dtype:
        raise CheckpointError(target, _wanted(spec), f"{tensor.dtype} {list(tensor.shape)}", spec.name)


def _wanted(spec: TensorSpec) -> str:
    return f"{'int64' if spec.dtype == 'I64' else 'float'} {list(spec.shape)}"


def _encode(group: Group, tensor: Tensor, place: Path, keep: Tensor | None = None) -> list[Tensor]:
    """Encode one parameter's values as its stored tensors, in the order of `group`; `keep` as in quantize_fp8."""
    spec, tensor = group[0], widened(tensor)
    try:
        if spec.dtype == "I8":
            return list(formats.quantize_fp4(tensor, keep))
        if spec.dtype == "F8_E4M3":
            return list(formats.quantize_fp8(tensor, TORCH_DTYPES[group[1].dtype], keep))
    except ValueError as error:
        raise CheckpointError(place, f"values that {spec.dtype} can hold", str(error), spec.name) from error
    if spec.dtype == "I64":
        return [tensor]  # never cast: ShardWriter refuses another dtype
    written = tensor.detach().to(TORCH_DTYPES[spec.dtype]).cpu().contiguous()
    if (wrong := first_not_finite(written)) is not None:
        found = f"{tensor.reshape(-1)[wrong].item()!r} at {[int(i) for i in np.unravel_index(wrong, written.shape)]}"
        raise CheckpointError(place, f"finite numbers that {spec.dtype} can hold", found, spec.name)
    return [written]


def _recode(group: Group, source: Checkpoint, format: Format, rounding: Rounding) -> list[Tensor]:
    spec = group[0]
    raw, scales = source.stored(spec.name), source.scale(spec.name)
    if len(group) == 2 and scales is not None:
        scale_dtype = TORCH_DTYPES[group[1].dtype]
        if source.layout == format and scales.dtype == scale_dtype:
            return [raw, scales]
        if spec.dtype == "F8_E4M3" and raw.dtype == torch.int8 and not rounding.allowed:
            file, name = source.place(spec.name)
            try:
                return list(formats.fp4_to_fp8(raw, scales, scale_dtype))
            except ValueError as error:
                wanted = "FP4 values with an exact FP8 form (or --allow-rounding; in Python allow_rounding=True)"
                raise CheckpointError(file, wanted, str(error), name) from error
    place = source.place(spec.name)
    values = source.parameter(spec.name)
    written = _encode(group, values, place[0])
    if spec.dtype not in ("F32", "I64") and written[0].dtype != values.dtype:  # float32 holds all that is read
        rounding.compare(spec.component, place, values, _decode(written), spec.dtype)
    return written


def _merge(group: Group, source: Checkpoint, adapter: Adapter, rounding: Rounding) -> list[Tensor]:
    """A matrix with an adapter's product added, in the format asked for."""
    spec, place = group[0], source.place(group[0].name)
    values = adapter.apply(spec.name, source.parameter(spec.name))
    written = _encode(group, values, place[0])
    if written[0].dtype != values.dtype:
        rounding.compare(spec.component, place, values, _decode(written), spec.dtype, asked=True)
    return written


def _decode(written: list[Tensor]) -> Tensor:
    """Values of a parameter from its stored tensors."""
    if len(written) == 1:
        return written[0]
    return (formats.dequantize_fp4 if written[0].dtype == torch.int8 else formats.dequantize_fp8)(*written)


def _is_extra(file: Path) -> bool:
    weights = file.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf")
    return file.is_file() and not weights and file.name not in ("config.json", INDEX_NAME) and file.name[0] != "."


def _write(
    target: Path,
    config: ModelConfig,
    format: Format,
    plain: StorageLayout,
    encode: Callable[[Group], list[Tensor]],
    extras: Iterable[Path],
    max_shard_bytes: int,
    overwrite: bool,
    progress: WriteProgress | None = None,
    check_source: Callable[[], None] = lambda: None,
) -> None:
    layout = plain if format == "transformers" else format
    rename = names.to_transformers if format == "transformers" else str
    shards = list(_plan(tensor_inventory(config, layout), max_shard_bytes))
    done, total = 0, sum(spec.num_bytes for groups in shards for group in groups for spec in group)
    weight_map: dict[str, str] = {}
    check_space(target, total)
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
        for file in extras:
            copy_file(file, folder / file.name)
        check_source()


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


def _config_json(config: ModelConfig, layout: StorageLayout) -> dict[str, Any]:
    if layout in ("official", "official-base"):
        return replace(config, expert_dtype="fp4" if layout == "official" else "fp8").to_dict()
    content = config.to_dict(quantized=False)
    return {**content, "torch_dtype": "float32" if layout == "fp32" else "bfloat16"}
