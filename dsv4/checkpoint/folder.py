"""An opened model folder: official FP4 or FP8, plain BF16 or FP32, or as transformers saved it.

The whole folder is checked, from config, index and headers, before the first value is read. Tensors are then read one
at a time from the mapped files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from dsv4.analysis.inventory import StorageLayout, TensorSpec, tensor_inventory
from dsv4.checkpoint import formats, names
from dsv4.checkpoint.errors import CheckpointError
from dsv4.checkpoint.shards import Shards, TensorEntry, read_json
from dsv4.config import ModelConfig
from dsv4.model_folder import resolve_model
from dsv4.notices import warn_once

PLAIN_DTYPES = ("BF16", "F32", "F16")
# Dtype of most routed experts -> layout of the folder.
_LAYOUT_OF: dict[str, StorageLayout] = {
    "I8": "official",
    "F8_E4M3": "official-base",
    "BF16": "bf16",
    "F32": "fp32",
    "F16": "fp32",
}


class _Source(NamedTuple):
    """Location of one official tensor: a stored tensor, or a part of one that holds all experts."""

    stored: TensorEntry
    part: names.MergedPart | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        if self.part is None:
            return self.stored.shape
        rows, columns = self.stored.shape[1:]
        return (rows if self.part.half is None else rows // 2, columns)


class Checkpoint:
    """An opened folder with exactly the tensors that its config requires, each of the right shape and dtype.

    `config`: as stored, but without an MTP block if transformers saved the folder, which drops the block.
    `layout`: storage of the tensors. "official-base" with `scale_dtype` F8_E8M0 is the output of DeepSeek's converter
    for FP4 experts. "bf16" and "fp32" name the dtype of most experts; any float tensor may then be of any plain dtype.
    """

    def __init__(self, path: str | Path, revision: str | None = None) -> None:
        folder = resolve_model(path, revision)
        config = _read_config(folder)
        self.folder = folder
        self._shards = Shards(folder)
        try:
            self._sources, unread = _official_sources(self._shards, config)
            self.config = _without_lost_mtp(config, self._shards, self._sources)
            self.layout = _detect_layout(self._sources)
            self.scale_dtype = _detect_scale_dtype(self._sources, self.layout)
            _check(folder, self._sources, self.config, self.layout, self.scale_dtype)
            if unread:
                warn_once(_unread_line(folder, unread))
        except BaseException:
            self.close()
            raise

    def parameter(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """Values of an official parameter: float32 if it was quantized, else in the stored dtype.

        On the CPU a plain tensor is a view of the mapped file: copy it before writing to it or closing.
        """
        tensor = self.stored(name).to(device)
        scale = self.scale(name)
        if scale is None:
            return tensor
        dequantize = formats.dequantize_fp4 if tensor.dtype == torch.int8 else formats.dequantize_fp8
        return dequantize(tensor, scale.to(device))

    def scale(self, name: str) -> Tensor | None:
        """Scales of an official parameter, as stored; None if it is not quantized."""
        scale = name.removesuffix("weight") + "scale"
        return self.stored(scale) if name.endswith(".weight") and scale in self._sources else None

    def stored(self, name: str) -> Tensor:
        """One official tensor (codes and scales included) as stored: a view of the mapped file."""
        source = self._sources[name]
        tensor = self._shards.read(source.stored)
        if source.part is None:
            return tensor
        tensor = tensor[source.part.expert]
        return tensor if source.part.half is None else tensor.chunk(2)[source.part.half]

    def place(self, name: str) -> tuple[Path, str]:
        """File and stored name of an official tensor, for messages."""
        stored = self._sources[name].stored
        return stored.file, stored.name

    def index(self, name: str, index: list[int]) -> list[int]:
        """Index in the stored tensor of an element of an official tensor, for messages."""
        source = self._sources[name]
        if source.part is None:
            return index
        row, column = index
        return [source.part.expert, row + (source.part.half or 0) * source.shape[0], column]

    def map_files(self) -> list[Path]:
        """Map every file that holds one of the tensors, and return the paths."""
        first = {source.stored.file: source.stored for source in self._sources.values()}
        for stored in first.values():
            self._shards.read(stored)
        return list(first)

    def close(self) -> None:
        self._shards.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_config(path: str | Path) -> ModelConfig:
    """Config of the model that `load_model` would return; CheckpointError if the folder's files disagree."""
    folder = resolve_model(path)
    config = _read_config(folder)
    with Shards(folder) as shards:
        return _without_lost_mtp(config, shards, _official_sources(shards, config)[0])


def _read_config(folder: Path) -> ModelConfig:
    if not folder.is_dir():
        raise CheckpointError(folder, "a model folder", "no such folder" if not folder.exists() else "a file")
    raw = read_json(folder / "config.json")
    try:
        return ModelConfig.from_dict(raw, folder / "config.json")
    except ValueError as error:
        raise CheckpointError(folder / "config.json", "a DeepSeek V4 config", str(error)) from error


def _official_sources(shards: Shards, config: ModelConfig) -> tuple[dict[str, _Source], list[TensorEntry]]:
    """(location of each official tensor, the unread tensors of a draft model)."""
    num_experts = config.n_routed_experts
    sources: dict[str, _Source] = {}
    unread: list[TensorEntry] = []
    for stored in shards.tensors.values():
        official = names.to_official(stored.name)
        if names.is_draft(official, config.num_nextn_predict_layers):
            unread.append(stored)
            continue
        if names.is_duplicate(official):
            continue
        parts = names.merged_parts(official, num_experts)
        if parts and (len(stored.shape) != 3 or stored.shape[0] != num_experts):
            expected = f"three dimensions, {num_experts} experts first"
            raise CheckpointError(stored.file, expected, f"shape {list(stored.shape)}", stored.name)
        found = [(part.name, _Source(stored, part)) for part in parts] or [(official, _Source(stored))]
        for name, source in found:
            if name in sources:
                first = sources[name].stored
                expected = f"{name} once, which {first.name!r} in {first.file.name} already is"
                raise CheckpointError(stored.file, expected, "a duplicate", stored.name)
            sources[name] = source
    return sources, unread


def _unread_line(folder: Path, unread: list[TensorEntry]) -> str:
    modules = Counter(".".join(tensor.name.removeprefix("model.").split(".")[:2]) for tensor in unread)
    size = sum(tensor.num_bytes for tensor in unread) / 1e9
    return (
        f"{folder}: left unread, as the model is whole without it: a draft model in "
        f"{', '.join(f'{name} ({count})' for name, count in sorted(modules.items()))}, "
        f"{len(unread)} tensors, {size:.3g} GB"
    )


def _without_lost_mtp(config: ModelConfig, shards: Shards, sources: dict[str, _Source]) -> ModelConfig:
    """Config without the MTP block if transformers saved the folder: it writes the block's count, but not the block."""
    if any(name.startswith("mtp.") for name in sources) or not any(map(names.is_transformers, shards.tensors)):
        return config
    ratios = config.compress_ratios[: config.num_hidden_layers]
    return replace(config, num_nextn_predict_layers=0, compress_ratios=ratios)


def _detect_layout(sources: dict[str, _Source]) -> StorageLayout:
    """Layout by the dtype of most routed experts, so that one wrong tensor does not condemn the whole folder.

    Experts of an unknown dtype (U8, say) count as FP4 if they have scales, so that the error names them.
    """
    experts = [name for name in sources if ".experts." in name and name.endswith(".weight")]
    common = Counter(sources[name].stored.dtype for name in experts).most_common(1)
    if not common:
        return "bf16"
    scaled = any(name.removesuffix("weight") + "scale" in sources for name in experts)
    return _LAYOUT_OF.get(common[0][0], "official" if scaled else "bf16")


def _detect_scale_dtype(sources: dict[str, _Source], layout: StorageLayout) -> str:
    if layout != "official-base":
        return "F8_E8M0"
    scales = Counter(source.stored.dtype for name, source in sources.items() if name.endswith(".scale"))
    return "F8_E8M0" if scales["F8_E8M0"] > scales["F32"] else "F32"


def _check(
    folder: Path, sources: dict[str, _Source], config: ModelConfig, layout: StorageLayout, scale_dtype: str
) -> None:
    """CheckpointError unless there are exactly the expected tensors, of the right shape and dtype; names the first."""
    expected = {spec.name: spec for spec in tensor_inventory(config, layout)}
    for name, spec in expected.items():
        if name not in sources:
            missing = sum(other not in sources for other in expected)
            found = f"no such tensor ({missing} of {len(expected)} are missing){_mtp_hint(name)}"
            raise CheckpointError(folder, _describe(_dtypes(spec, layout, scale_dtype), spec.shape), found, name)
    for name, source in sources.items():
        stored = source.stored
        if name not in expected:
            unexpected = sum(other not in expected for other in sources)
            found = f"{_describe([stored.dtype], stored.shape)} ({unexpected} unexpected in all)"
            raise CheckpointError(stored.file, "no tensor of that name in this model", found, stored.name)
        dtypes, shape = _dtypes(expected[name], layout, scale_dtype), expected[name].shape
        if stored.dtype not in dtypes or source.shape != shape:
            part = "" if source.part is None else f" in it for {name}"
            packed = ", FP4 packed two to a byte" if dtypes == ["I8"] else ""
            found = _describe([stored.dtype], stored.shape)
            raise CheckpointError(stored.file, _describe(dtypes, shape) + packed + part, found, stored.name)


def _mtp_hint(missing: str) -> str:
    if not missing.startswith("mtp."):
        return ""
    return '; with "num_nextn_predict_layers": 0 in config.json the model loads without its MTP block'


def _dtypes(spec: TensorSpec, layout: StorageLayout, scale_dtype: str) -> Sequence[str]:
    if spec.component == "scale":
        return [scale_dtype]
    if spec.dtype == "I64" or layout in ("official", "official-base"):
        return [spec.dtype]
    return PLAIN_DTYPES


def _describe(dtypes: Sequence[str], shape: tuple[int, ...]) -> str:
    return f"{' or '.join(dtypes)} {list(shape)}"
