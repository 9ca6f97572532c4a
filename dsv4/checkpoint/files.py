"""Writers of a model folder's files: safetensors shards (tensors in any order), JSON, and copies; each synced."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from dsv4.analysis.inventory import DTYPE_BYTES, TensorSpec
from dsv4.checkpoint.errors import CheckpointError

WriteProgress = Callable[[int, int], None]  # (tensor bytes written so far, tensor bytes in all)

TORCH_DTYPES = {
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I8": torch.int8,
}


class ShardWriter:
    """Writer of one safetensors file with planned tensors, which arrive in any order and go to their offsets.

    The safetensors library's writer needs all tensors of a file in memory at once; this one holds none.
    """

    def __init__(self, file: Path, specs: Sequence[TensorSpec]) -> None:
        self._missing = {spec.name: spec for spec in specs}
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._offsets: dict[str, int] = {}
        end = 0
        # Wide elements first, so that every tensor starts at a multiple of its element size.
        for spec in sorted(specs, key=lambda spec: -DTYPE_BYTES[spec.dtype]):
            self._offsets[spec.name], end = end, end + spec.num_bytes
            place = [self._offsets[spec.name], end]
            header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": place}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self._handle = file.open("wb")
        self._handle.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: Tensor) -> None:
        spec = self._missing.pop(name)
        if tuple(tensor.shape) != spec.shape or tensor.dtype != TORCH_DTYPES[spec.dtype]:
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}; planned: {spec.dtype} {list(spec.shape)}")
        self._handle.seek(self._start + self._offsets[name])
        self._handle.write(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._handle:
            if kind is None:
                if self._missing:
                    raise ValueError(f"never written: {', '.join(self._missing)}")
                self._handle.flush()
                os.fsync(self._handle.fileno())


def refuse_source(source: Path, target: Path) -> None:
    """CheckpointError if replacing `target` would remove `source`, which is read meanwhile."""
    place = target.resolve()
    for file in (source, *source.iterdir()):  # a file may be a link to another folder
        if file.resolve().is_relative_to(place):
            raise CheckpointError(target, "another folder than the source's", f"the source, {file}")


def write_json(file: Path, value: object) -> None:
    with file.open("w", encoding="utf-8") as handle:
        handle.write(json.dumps(value, indent=2) + "\n")
        handle.flush()
        os.fsync(handle.fileno())


def copy_file(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    with target.open("rb+") as handle:
        os.fsync(handle.fileno())
