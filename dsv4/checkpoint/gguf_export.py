"""Write a model as one GGUF file for llama.cpp, tensor by tensor; memory holds one tensor, or one layer's experts."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType as Value
from torch import Tensor

from dsv4.analysis.inventory import TensorSpec, tensor_inventory
from dsv4.checkpoint.atomic import check_space, new_file
from dsv4.checkpoint.errors import CheckpointError
from dsv4.checkpoint.files import WriteProgress
from dsv4.checkpoint.folder import Checkpoint
from dsv4.checkpoint.gguf_names import ARCHITECTURE, index_head_dim, metadata, to_gguf
from dsv4.checkpoint.gguf_vocab import vocabulary
from dsv4.checkpoint.mapped import MappedFiles
from dsv4.checkpoint.reading import check_expert_ids
from dsv4.checkpoint.rounding import Rounding, RoundingError
from dsv4.checkpoint.values import check_values, first_not_finite
from dsv4.config import ModelConfig
from dsv4.kernels.router.reference import repeats
from dsv4.notices import warn_once

Linears = Literal["bf16", "q8_0"]
Array = np.ndarray[Any, Any]

_BLOCK = 32  # columns of one MXFP4 or Q8_0 block
_LINEAR_TYPES = {"bf16": Type.BF16, "q8_0": Type.Q8_0}
# Vectors must be F32 in llama.cpp. The router is too: llama.cpp rounds the input of BF16 weights, and would choose
# other experts.
_ALWAYS_F32 = ("ffn.gate.weight",)


class _Planned(NamedTuple):
    """One tensor of the file. `sources`: official names; several for the experts of a layer, or e_proj and h_proj."""

    name: str
    component: str  # the kind of tensor, in the inventory's words
    shape: tuple[int, ...]  # outermost first; GGUF lists it from the other end
    type: Type
    sources: list[str]

    @property
    def num_bytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[self.type]
        return prod(self.shape) // block * size


def export_gguf(
    src: str | Path,
    dst: str | Path,
    *,
    linears: Linears | None = None,
    mtp: bool = False,
    overwrite: bool = False,
    allow_rounding: bool = False,
    progress: WriteProgress | None = None,
) -> dict[str, RoundingError]:
    """Write the model folder `src` as the file `dst`, which appears whole or not at all.

    FP4 experts become MXFP4 with the same codes and scales. linears: type for the FP8 matrices and for experts that are
    not FP4; None takes BF16, or F32 if the folder holds F32 values or scales; "q8_0" rounds and runs faster in
    llama.cpp. CheckpointError names a tensor without an exact form, unless `allow_rounding`, and a tensor with NaN or
    infinity; DiskFullError names a target that does not fit. mtp: only the MTP block, as llama.cpp's draft model.
    progress: called with the tensor bytes written so far and in all.
    Returns the rounding errors, by kind of tensor.
    """
    if linears is not None and linears not in _LINEAR_TYPES:
        raise ValueError(f"linears = {linears!r} is not allowed; allowed: None, {', '.join(map(repr, _LINEAR_TYPES))}")
    target, rounding = Path(dst), Rounding(allow_rounding)
    with Checkpoint(src) as source:
        files = MappedFiles(source)
        if mtp and not source.config.num_nextn_predict_layers:
            raise CheckpointError(source.folder, "an MTP block to write", "none")
        plan = _plan(source, linears, mtp)
        keys = metadata(source.config, mtp)
        tokenizer = vocabulary(source.folder, source.config)
        total = sum(planned.num_bytes for planned in plan)
        _check_target(target, overwrite)
        check_space(target, total)
        target.parent.mkdir(parents=True, exist_ok=True)
        with new_file(target) as file:
            writer = gguf.GGUFWriter(file, ARCHITECTURE)
            try:
                writer.add_name(target.stem)
                writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
                writer.add_file_type(_file_type(plan))
                for key, value in keys.items():
                    _add(writer, f"{ARCHITECTURE}.{key}", value)
                for key, value in tokenizer.items():
                    _add(writer, key, value)
                for planned in plan:
                    writer.add_tensor_info(
                        planned.name, planned.shape, np.dtype(np.float32), planned.num_bytes, raw_dtype=planned.type
                    )
                writer.write_header_to_file()
                writer.write_kv_data_to_file()
                writer.write_ti_data_to_file()
                done = 0
                for planned in plan:
                    writer.write_tensor_data(_data(planned, source, rounding))
                    done += planned.num_bytes
                    if progress is not None:
                        progress(done, total)
                files.check()
            finally:
                writer.close()
    return rounding.errors


def _plan(source: Checkpoint, linears: Linears | None, mtp: bool) -> list[_Planned]:
    """Every tensor of the file, in checkpoint order."""
    config = source.config
    groups: dict[str, list[TensorSpec]] = {}
    for spec in tensor_inventory(config, "official"):
        shared = spec.name in ("embed.weight", "norm.weight", "head.weight")
        if spec.component != "scale" and (shared or spec.name.startswith("mtp.") == mtp):
            groups.setdefault(to_gguf(spec.name, config), []).append(spec)
    plan: list[_Planned] = []
    for name, specs in groups.items():
        first = specs[0]
        shape = (first.shape[0], first.shape[1] * 2) if first.dtype == "I8" else first.shape
        shape = tuple(_pad_index_heads(first.name, torch.empty(shape, device="meta"), config).shape)
        if first.component == "routed_experts":
            shape = (len(specs), *shape)
        elif len(specs) > 1:
            shape = (shape[0], shape[1] * len(specs))
        sources = [spec.name for spec in specs]
        plan.append(_Planned(name, first.component, shape, _type(first, sources, source, shape[-1], linears), sources))
    return plan


def _type(spec: TensorSpec, names: list[str], source: Checkpoint, columns: int, linears: Linears | None) -> Type:
    if spec.dtype == "I64":
        return Type.I32
    if spec.dtype == "F32" or len(spec.shape) == 1 or spec.name.endswith(_ALWAYS_F32):
        return Type.F32
    stored = {source.stored(name).dtype for name in names}
    if stored == {torch.int8} and columns % _BLOCK == 0:
        return Type.MXFP4
    if spec.dtype != "BF16" and linears is not None and (linears != "q8_0" or columns % _BLOCK == 0):
        return _LINEAR_TYPES[linears]
    fp8 = torch.float8_e4m3fn in stored and source.scale_dtype == "F32"
    return Type.F32 if fp8 or stored & {torch.float32, torch.float16} else Type.BF16


def _file_type(plan: list[_Planned]) -> gguf.LlamaFileType:
    """llama.cpp's type of the whole file, which it only displays."""
    types = {planned.type for planned in plan}
    if Type.MXFP4 in types:
        return gguf.LlamaFileType.MOSTLY_MXFP4_MOE
    if Type.Q8_0 in types:
        return gguf.LlamaFileType.MOSTLY_Q8_0
    return gguf.LlamaFileType.MOSTLY_BF16 if Type.BF16 in types else gguf.LlamaFileType.ALL_F32


def _data(planned: _Planned, source: Checkpoint, rounding: Rounding) -> Array:
    """The tensor's bytes, in an array of the planned size."""
    if ".ffn.experts." not in planned.sources[0]:
        parts = [_values(name, source) for name in planned.sources]
        values = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        return _encode(values, planned, source, planned.sources[0], rounding)
    merged = np.empty((len(planned.sources), planned.num_bytes // len(planned.sources)), np.uint8)
    for expert, name in enumerate(planned.sources):
        if planned.type == Type.MXFP4:
            data = _mxfp4(name, source)
        else:
            data = _encode(_values(name, source), planned, source, name, rounding)
        merged[expert] = data.reshape(-1).view(np.uint8)
    return merged


def _values(name: str, source: Checkpoint) -> Tensor:
    check_values(source, name)
    if name.endswith("tid2eid"):
        table = source.stored(name)
        check_expert_ids(table, source, name)
        repeating = int(repeats(table).any(-1).sum())
        if repeating:
            file, stored = source.place(name)
            warn_once(f"{file}: tensor {stored!r} repeats an expert for {repeating} tokens; llama.cpp counts it twice")
    return _pad_index_heads(name, source.parameter(name), source.config)


def _encode(values: Tensor, planned: _Planned, source: Checkpoint, name: str, rounding: Rounding) -> Array:
    if planned.type == Type.I32:
        return values.to(torch.int32).numpy()
    place = source.place(name)
    if planned.type == Type.BF16:
        rounded = values.to(torch.bfloat16).contiguous()
        if (wrong := first_not_finite(rounded)) is not None:
            found = repr(values.reshape(-1)[wrong].item())
            raise CheckpointError(place[0], "finite numbers that BF16 can hold", found, place[1])
        rounding.compare(planned.component, place, values, rounded, "BF16")
        return rounded.view(torch.int16).numpy()
    floats = values.to(torch.float32).contiguous().numpy()
    if planned.type == Type.F32:
        return floats
    blocks = gguf.quantize(floats, planned.type)
    written = torch.as_tensor(gguf.dequantize(blocks, planned.type))
    rounding.compare(planned.component, place, values, written, planned.type.name, asked=True)
    return blocks


def _mxfp4(name: str, source: Checkpoint) -> Array:
    """FP4 [out, in/2] with scales [out, in/32] -> blocks [out, in/32, 17]: the scale's byte, then 16 bytes of codes.

    Byte j of a block holds columns j (low nibble) and j + 16; in the official format it holds 2j and 2j + 1.
    """
    check_values(source, name)
    codes, scales = source.stored(name), source.scale(name)
    assert scales is not None
    exponents = scales.view(torch.uint8).numpy()
    packed = codes.view(torch.uint8).numpy().reshape(*exponents.shape, _BLOCK // 2)
    first, second = packed[..., : _BLOCK // 4], packed[..., _BLOCK // 4 :]
    blocks = np.empty((*exponents.shape, 1 + _BLOCK // 2), np.uint8)
    blocks[..., 0] = exponents
    blocks[..., 1::2] = first & 15 | second << 4
    blocks[..., 2::2] = first >> 4 | second & 0xF0
    return blocks


def _pad_index_heads(name: str, values: Tensor, config: ModelConfig) -> Tensor:
    """Pad index heads to llama.cpp's width: zeros before the channels, since RoPE rotates the last ones.

    Zeros add nothing to a score; their effect on the key's norm scales all scores alike.
    """
    missing = index_head_dim(config) - config.index_head_dim
    if not missing or ".indexer." not in name or name.endswith("weights_proj.weight"):
        return values
    axis = values.dim() - 1 if name.endswith(".ape") else 0
    before, after = values.shape[:axis], values.shape[axis + 1 :]
    heads = values.reshape(*before, -1, config.index_head_dim, *after)
    zeros = torch.zeros(*before, heads.shape[axis], missing, *after, dtype=values.dtype, device=values.device)
    return torch.cat([zeros, heads], axis + 1).flatten(axis, axis + 1)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """One key; integers as u32, floats as f32, lists of them likewise."""
    if isinstance(value, list):
        writer.add_array(key, cast("list[Any]", value))
    else:
        kinds = {bool: Value.BOOL, int: Value.UINT32, float: Value.FLOAT32, str: Value.STRING}
        writer.add_key_value(key, value, kinds[type(value)])


def _check_target(target: Path, overwrite: bool) -> None:
    if target.suffix != ".gguf":
        raise CheckpointError(target, "a file name that ends in .gguf", repr(target.name))
    if target.is_dir():
        raise CheckpointError(target, "the name of a file", "a folder")
    if target.exists() and not overwrite:
        raise CheckpointError(
            target, "a new file (or --overwrite; in Python overwrite=True)", "something there already"
        )
