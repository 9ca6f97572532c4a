"""The safetensors files of one folder: index and headers, checked against each other; tensors as mapped views."""

from __future__ import annotations

import json
from collections import Counter
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, cast

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dsv4.analysis.inventory import DTYPE_BYTES
from dsv4.checkpoint.errors import CheckpointError
from dsv4.notices import warn_once

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_BYTES = {**DTYPE_BYTES, "F16": 2}


class TensorEntry(NamedTuple):
    """One tensor as a file's header lists it."""

    file: Path
    name: str
    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of its values; 0 for a dtype that no model uses."""
        return prod(self.shape) * _BYTES.get(self.dtype, 0)


class Shards:
    """Opened safetensors files. `tensors`: all, by stored name. Opening reads headers; CheckpointError if wrong."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[Path, Any] = {}
        if not folder.is_dir():
            raise CheckpointError(folder, "a model folder", "no such folder" if not folder.exists() else "a file")
        index = folder / INDEX_NAME
        if index.is_file():
            self.tensors = _read_indexed(folder, index)
        elif (folder / SINGLE_NAME).is_file():
            self.tensors = _read_header(folder / SINGLE_NAME)
        else:
            others = sorted(path.name for path in folder.glob("*.safetensors"))
            found = f"{len(others)} other shards, {others[0]!r} the first" if others else "no weights"
            raise CheckpointError(folder, f"{INDEX_NAME} or {SINGLE_NAME}", found)

    def read(self, tensor: TensorEntry) -> Tensor:
        """The stored tensor, on the CPU, as a view of the mapped file: not to be written to, not to outlive `close`."""
        try:
            if tensor.file not in self._open:
                # safe_open has no annotations that a strict checker could follow.
                self._open[tensor.file] = cast(Any, safe_open)(tensor.file, framework="pt").__enter__()
            return self._open[tensor.file].get_tensor(tensor.name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(tensor.file, "the file as it was when opened", str(error), tensor.name) from error

    def close(self) -> None:
        for handle in self._open.values():
            handle.__exit__(None, None, None)
        self._open.clear()

    def __enter__(self) -> Shards:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError if it is missing or something else."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for name, count in Counter(name for name, _ in pairs).items():
            if count > 1:
                raise CheckpointError(file, "each key of an object once", f"{count} of that name", name)
        return dict(pairs)

    try:
        value: object = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=once)
    except FileNotFoundError as error:
        raise CheckpointError(file, "a JSON file", "no such file") from error
    except OSError as error:
        raise CheckpointError(file, "a readable JSON file", error.strerror or str(error)) from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(file, "valid JSON", str(error)) from error
    if not isinstance(value, dict):
        raise CheckpointError(file, "a JSON object", type(value).__name__)
    return cast("dict[str, Any]", value)


def _read_indexed(folder: Path, index: Path) -> dict[str, TensorEntry]:
    content = read_json(index)
    weight_map: Any = content.get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(index, "an object 'weight_map'", repr(weight_map))
    shard_of = cast("dict[str, Any]", weight_map)
    for name, shard in shard_of.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(index, "the name of a file beside the index", repr(shard), name)
    headers: dict[str, dict[str, TensorEntry]] = {}
    for name, shard in shard_of.items():
        if shard not in headers:
            if not (folder / shard).is_file():
                raise CheckpointError(folder / shard, f"the shard that {INDEX_NAME} lists", "no such file", name)
            headers[shard] = _read_header(folder / shard)
    unlisted = sorted(path.name for path in folder.glob("model*.safetensors") if path.name not in headers)
    if unlisted:
        raise CheckpointError(folder / unlisted[0], f"only the shards that {INDEX_NAME} lists", "one that it does not")
    tensors: dict[str, TensorEntry] = {}
    for shard, header in headers.items():
        for name, tensor in header.items():
            listed = shard_of.get(name)
            if listed != shard:
                if listed is not None and name in headers[listed]:
                    raise CheckpointError(tensor.file, f"the tensor only in {listed}", "a duplicate", name)
                raise CheckpointError(index, f"weight_map to say {shard}, which holds it", repr(listed), name)
            tensors[name] = tensor
    for name, shard in shard_of.items():
        if name not in tensors:
            raise CheckpointError(folder / shard, f"the tensor, as {INDEX_NAME} says", "no such tensor", name)
    _compare_total(index, content, tensors)
    return tensors


def _compare_total(index: Path, content: dict[str, Any], tensors: dict[str, TensorEntry]) -> None:
    metadata: Any = content.get("metadata", {})
    if not isinstance(metadata, dict):
        raise CheckpointError(index, "an object 'metadata'", repr(metadata))
    total: Any = cast("dict[str, Any]", metadata).get("total_size")
    size = sum(tensor.num_bytes for tensor in tensors.values())
    if total is not None and total != size and all(tensor.dtype in _BYTES for tensor in tensors.values()):
        # Only a warning: nothing is computed from total_size, and tools that edit folders leave it out of date.
        warn_once(f"{index}: metadata.total_size is {total!r}, but the tensors have {size} bytes")


def _read_header(file: Path) -> dict[str, TensorEntry]:
    """Tensors of one safetensors file, from its header; the library checks that the data is complete."""
    try:
        with cast(Any, safe_open)(file, framework="np"):  # "pt" would already map the file copy-on-write
            pass
    except (SafetensorError, OSError) as error:
        found = f"{file.stat().st_size} bytes that are not: {error}"
        raise CheckpointError(file, "a whole safetensors file", found) from error
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        # Pairs, not a dict: a duplicate name must not vanish.
        pairs: list[tuple[str, Any]] = json.loads(handle.read(length), object_pairs_hook=list)
    tensors: dict[str, TensorEntry] = {}
    counts = Counter(name for name, _ in pairs)
    for name, value in pairs:
        if name == "__metadata__":
            continue
        if counts[name] > 1:
            raise CheckpointError(file, "each tensor once", f"{counts[name]} of that name", name)
        fields: dict[str, Any] = dict(value)
        tensors[name] = TensorEntry(file, name, fields["dtype"], tuple(fields["shape"]))
    return tensors
