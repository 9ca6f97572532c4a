"""Headers of a model's safetensors files: names, dtypes and sizes of tensors, without reading weights. No torch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


class HeaderEntry(NamedTuple):
    """One tensor of a header."""

    dtype: str  # as safetensors spells it
    num_bytes: int


Header = Mapping[str, HeaderEntry]


def weight_files(folder: Path) -> list[str]:
    """Names of the files in a folder's index, sorted; model.safetensors without an index.

    ValueError for an index that lists no files, or files that are not safetensors files in the same folder.
    """
    index = folder / INDEX_NAME
    if not index.is_file():
        return [SINGLE_NAME]
    weight_map = _read_object(index, index.read_bytes()).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: expected an object 'weight_map' of tensors and files, found {weight_map!r}")
    files = cast("dict[str, Any]", weight_map).values()
    for file in files:
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{index}: expected names of safetensors files beside the index, found {file!r}")
    return sorted(set(files))


def read_headers(folder: Path) -> dict[str, Header]:
    """Headers of a folder's weights: file -> header; empty without weights. ValueError for a damaged file."""
    files = weight_files(folder)
    if not (folder / files[0]).is_file() and files == [SINGLE_NAME]:
        return {}
    return {file: _read_header(folder / file) for file in files}


def count_stored(headers: Iterable[Header]) -> dict[str, Any]:
    """Count files, tensors and bytes of headers, in total and by dtype, ready for JSON."""
    files = 0
    tensors: Counter[str] = Counter()
    num_bytes: Counter[str] = Counter()
    for header in headers:
        files += 1
        for entry in header.values():
            tensors[entry.dtype] += 1
            num_bytes[entry.dtype] += entry.num_bytes
    return {
        "files": files,
        "tensors": tensors.total(),
        "bytes": num_bytes.total(),
        "by_dtype": dict(sorted(tensors.items())),
        "bytes_by_dtype": dict(sorted(num_bytes.items())),
    }


def _read_header(file: Path) -> Header:
    size = file.stat().st_size
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if length > size - 8:
            raise ValueError(f"{file}: expected a safetensors file; found {size} bytes whose header is cut off or none")
        content = _read_object(file, handle.read(length))
    try:
        return {
            name: HeaderEntry(entry["dtype"], entry["data_offsets"][1] - entry["data_offsets"][0])
            for name, entry in content.items()
            if name != "__metadata__"
        }
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(
            f"{file}: expected a dtype and data_offsets of every tensor; {error!r} in the header"
        ) from error


def _read_object(file: Path, text: bytes) -> dict[str, Any]:
    try:
        content: object = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object, found {type(content).__name__}")
    return cast("dict[str, Any]", content)
